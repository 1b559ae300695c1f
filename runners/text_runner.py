"""RankedTextRunner: the async facade over a rank group that serves text, one for all engines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

from runners.config import BaseRunnerConfig
from runners.contracts import (
    GenerationRequest,
    ModelInfo,
    Prompt,
    RunnerHealth,
    TextDelta,
)
from runners.errors import InvalidRequest, RunnerUnavailable, TriptychError, from_wire
from runners.ranks.group import RankGroup
from runners.ranks.messages import (
    Abort,
    Accepted,
    CallFailed,
    Deltas,
    Detokenize,
    Failed,
    RankMessage,
    Submit,
    Text,
    Tokenize,
    Tokens,
)


class RankedTextStream:
    """One generation in a rank group; see `contracts.TextStream`."""

    def __init__(self, runner: RankedTextRunner, request_id: str) -> None:
        self._runner = runner
        self._request_id = request_id
        self._queue: asyncio.Queue[TextDelta | TriptychError] = asyncio.Queue()
        self.accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def request_id(self) -> str:
        """The id of the request this stream answers."""
        return self._request_id

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return self.accepted.result()

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        """Yield deltas; the last one carries a `finish_reason`."""
        while True:
            item = await self._queue.get()
            if isinstance(item, TriptychError):
                raise item
            yield item
            if item.finish_reason is not None:
                return

    def push(self, item: TextDelta | TriptychError) -> None:
        """Take what the rank sent."""
        if isinstance(item, TriptychError) and not self.accepted.done():
            self.accepted.set_exception(item)
        else:
            self._queue.put_nowait(item)

    async def aclose(self) -> None:
        """Abort if unfinished."""
        self._runner.abort(self._request_id)

    async def __aenter__(self) -> RankedTextStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class RankedTextRunner:
    """A text model in a rank group; see `contracts.TextRunner`."""

    def __init__(self, config: BaseRunnerConfig, *, program: str) -> None:
        self._config = config
        self._group = RankGroup(
            config, program=program, on_message=self._on_message, on_down=self._on_down
        )
        self._streams: dict[str, RankedTextStream] = {}
        self._calls: dict[int, asyncio.Future[list[int] | str]] = {}
        self._call_ids = itertools.count()

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self._config.name

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        return self._group.info

    def health(self) -> RunnerHealth:
        """The state right now."""
        return self._group.health()

    async def start(self) -> None:
        """Begin loading and return at once."""
        await self._group.start()

    async def stop(self) -> None:
        """End all ranks."""
        await self._group.stop()
        self._on_down("the server is stopping")

    async def generate(self, request: GenerationRequest) -> RankedTextStream:
        """Hand a request to the engine and return once it was accepted."""
        if request.request_id in self._streams:
            raise InvalidRequest(
                f"request_id {request.request_id} is already in use", param="request_id"
            )
        self._group.send(Submit(request))
        stream = self._streams[request.request_id] = RankedTextStream(self, request.request_id)
        try:
            await stream.accepted
        except BaseException:
            self.abort(request.request_id)
            raise
        return stream

    def abort(self, request_id: str) -> None:
        """Forget a request and tell the rank, if it still runs."""
        if self._streams.pop(request_id, None) is not None and self.health().ready:
            self._group.send(Abort(request_id))

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text or a rendered conversation."""
        call_id = next(self._call_ids)
        answer = await self._call(call_id, Tokenize(call_id, prompt, add_special_tokens))
        return answer if isinstance(answer, list) else []

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        call_id = next(self._call_ids)
        answer = await self._call(call_id, Detokenize(call_id, token_ids, skip_special_tokens))
        return answer if isinstance(answer, str) else ""

    async def _call(self, call_id: int, message: Tokenize | Detokenize) -> list[int] | str:
        self._group.send(message)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            answer: list[int] | str = await future
            return answer
        finally:
            self._calls.pop(call_id, None)

    def _on_message(self, message: RankMessage) -> None:
        match message:
            case Deltas(deltas):
                for delta in deltas:
                    self._deliver(delta)
            case Accepted(request_id, prompt_tokens):
                stream = self._streams.get(request_id)
                if stream is not None and not stream.accepted.done():
                    stream.accepted.set_result(prompt_tokens)
            case Failed(request_id, kind, text, param):
                stream = self._streams.pop(request_id, None)
                if stream is not None:
                    stream.push(from_wire(kind, text, param))
            case Tokens(call_id, answer) | Text(call_id, answer):
                self._answer(call_id, answer)
            case CallFailed(call_id, kind, text, param):
                self._answer(call_id, from_wire(kind, text, param))
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    def _deliver(self, delta: TextDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is not None:
            stream.push(delta)
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]

    def _answer(self, call_id: int, answer: list[int] | str | TriptychError) -> None:
        future = self._calls.get(call_id)
        if future is None or future.done():
            return
        if isinstance(answer, TriptychError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_down(self, reason: str) -> None:
        message = f"model {self.name} went down with the request in flight: {reason}"
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.push(RunnerUnavailable(message))
        for call_id in list(self._calls):
            self._answer(call_id, RunnerUnavailable(message))
