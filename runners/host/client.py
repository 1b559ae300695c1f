"""RankClient: the async facade over a rank group, one for all engines and tasks."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar, cast

from typing_extensions import override

from runners.config.base import BaseRunnerConfig
from runners.contracts.errors import InvalidRequest, RunnerUnavailable, TriptychError, from_wire
from runners.contracts.images import ImageModelInfo, ImageRequest
from runners.contracts.runner import Event, Runner, RunnerHealth, Stream
from runners.contracts.tasks import TaskRequest
from runners.contracts.text import GenerationRequest, ModelInfo, Prompt
from runners.host.group import RankGroup
from runners.protocol.messages import (
    Abort,
    AbortCall,
    Accepted,
    CallFailed,
    Detokenize,
    Events,
    Failed,
    RankMessage,
    Submit,
    Text,
    Tokenize,
    Tokens,
)

RequestT = TypeVar("RequestT", bound=GenerationRequest | ImageRequest | TaskRequest)
EventT = TypeVar("EventT", bound=Event)
InfoT = TypeVar("InfoT", bound=ModelInfo | ImageModelInfo)


class RankStream(Stream[EventT]):
    """The events that a rank sends for one request."""

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self._request_id = request_id
        self._abort = abort
        self._queue: asyncio.Queue[EventT | TriptychError] = asyncio.Queue()
        self.accepted: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        """The rank's message that accepts the request."""

    @property
    @override
    def request_id(self) -> str:
        return self._request_id

    @property
    @override
    def prompt_tokens(self) -> int:
        return self.accepted.result().prompt_tokens

    @property
    @override
    def max_new_tokens(self) -> int:
        return self.accepted.result().max_new_tokens

    @override
    async def __aiter__(self) -> AsyncIterator[EventT]:
        while True:
            event = await self._queue.get()
            if isinstance(event, TriptychError):
                raise event
            yield event
            if event.finished:
                return

    def push(self, event: EventT | TriptychError) -> None:
        """Take an event, or the error that ends the request."""
        if isinstance(event, TriptychError) and not self.accepted.done():
            self.accepted.set_exception(event)
        else:
            self._queue.put_nowait(event)

    @override
    async def aclose(self) -> None:
        self._abort(self._request_id)

    @override
    async def __aenter__(self) -> RankStream[EventT]:
        return self

    @override
    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class RankClient(Runner[RequestT, EventT], Generic[RequestT, EventT, InfoT]):
    """A model in a rank group: its supervision, and the streams of its running requests."""

    def __init__(self, config: BaseRunnerConfig, *, program: str) -> None:
        self._config = config
        self._group = RankGroup(
            config, program=program, on_message=self._on_message, on_down=self._on_down
        )
        self._streams: dict[str, RankStream[EventT]] = {}
        self._ranks: dict[str, int] = {}
        self._calls: dict[int, asyncio.Future[list[int] | str]] = {}
        self._call_ids = itertools.count()

    @property
    @override
    def name(self) -> str:
        return self._config.name

    @property
    @override
    def version(self) -> str:
        return self._config.model_version

    @property
    @override
    def task(self) -> str:
        return self._config.task

    @property
    @override
    def max_concurrency(self) -> int:
        return self._config.max_concurrency

    @property
    @override
    def step_timeout(self) -> float:
        return self._config.step_timeout

    @property
    @override
    def devices(self) -> list[str]:
        info = self._group.info
        return [] if info is None else info.devices

    @property
    def info(self) -> InfoT | None:
        """What the ranks loaded; None before they were ready once."""
        return cast(InfoT | None, self._group.info)

    @override
    def health(self) -> RunnerHealth:
        return self._group.health()

    @override
    async def start(self) -> None:
        await self._group.start()

    @override
    async def stop(self) -> None:
        await self._group.stop()
        self._on_down("the server is stopping")

    @override
    async def submit(self, request: RequestT) -> RankStream[EventT]:
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequest(f"{request_id} is already in use", field="request_id")
        load = Counter(self._ranks.values())
        rank = min(range(self._config.serving_ranks), key=lambda rank: load[rank])
        self._group.send(Submit(request), rank)
        stream = self._streams[request_id] = RankStream[EventT](request_id, self.abort)
        self._ranks[request_id] = rank
        try:
            await stream.accepted
        except BaseException:
            self.abort(request_id)
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Drop a request, and tell its rank if the request still runs."""
        rank = self._ranks.get(request_id, 0)
        if self._remove(request_id) is not None and self.health().ready:
            self._group.send(Abort(request_id), rank)

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """See `contracts.text.TextRunner`."""
        call_id = next(self._call_ids)
        answer = await self._call(Tokenize(call_id, prompt, add_special_tokens))
        return answer if isinstance(answer, list) else []

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """See `contracts.text.TextRunner`."""
        call_id = next(self._call_ids)
        answer = await self._call(Detokenize(call_id, token_ids, skip_special_tokens))
        return answer if isinstance(answer, str) else ""

    async def _call(self, message: Tokenize | Detokenize) -> list[int] | str:
        self._group.send(message)
        future: asyncio.Future[list[int] | str] = asyncio.get_running_loop().create_future()
        self._calls[message.call_id] = future
        try:
            return await future
        finally:
            del self._calls[message.call_id]
            if future.cancelled() and self.health().ready:
                self._group.send(AbortCall(message.call_id))

    def _on_message(self, message: RankMessage) -> None:
        match message:
            case Events(events):
                for event in events:
                    self._deliver(cast(EventT, event))
            case Accepted(request_id):
                stream = self._streams.get(request_id)
                if stream is not None and not stream.accepted.done():
                    stream.accepted.set_result(message)
            case Failed(request_id, error, reason, field):
                stream = self._remove(request_id)
                if stream is not None:
                    stream.push(from_wire(error, reason, field))
            case Tokens(call_id, answer) | Text(call_id, answer):
                self._answer(call_id, answer)
            case CallFailed(call_id, error, reason, field):
                self._answer(call_id, from_wire(error, reason, field))
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    def _deliver(self, event: EventT) -> None:
        stream = self._streams.get(event.request_id)
        if stream is not None:
            stream.push(event)
            if event.finished:
                self._remove(event.request_id)

    def _answer(self, call_id: int, answer: list[int] | str | TriptychError) -> None:
        future = self._calls.get(call_id)
        if future is None or future.done():
            return
        if isinstance(answer, TriptychError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _remove(self, request_id: str) -> RankStream[EventT] | None:
        self._ranks.pop(request_id, None)
        return self._streams.pop(request_id, None)

    def _on_down(self, reason: str) -> None:
        error = RunnerUnavailable(
            f"model {self.name} went down with the request in flight: {reason}"
        )
        streams = list(self._streams.values())
        self._streams.clear()
        self._ranks.clear()
        for stream in streams:
            stream.push(error)
        for call_id in list(self._calls):
            self._answer(call_id, error)
