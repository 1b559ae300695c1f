"""What the async facades of all tasks share: streams of what ranks send, and their ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from runners.config.model import BaseRunnerConfig
from runners.contracts.errors import InvalidRequest, RunnerUnavailable, TriptychError, from_wire
from runners.contracts.runner import RunnerHealth
from runners.host.group import RankGroup
from runners.protocol.messages import Abort, Accepted, Failed, HostMessage, RankMessage

Item = TypeVar("Item")


class RankedStream(Generic[Item]):
    """What a rank sends for one request; `is_last` tells its end."""

    def __init__(
        self, runner: RankedRunner[Item], request_id: str, is_last: Callable[[Item], bool]
    ) -> None:
        self._runner = runner
        self._request_id = request_id
        self._is_last = is_last
        self._queue: asyncio.Queue[Item | TriptychError] = asyncio.Queue()
        self.accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def request_id(self) -> str:
        """The id of the request this stream answers."""
        return self._request_id

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return self.accepted.result()

    async def __aiter__(self) -> AsyncIterator[Item]:
        """Yield what comes, up to the last of it. Raises: the error the request ended with."""
        while True:
            item = await self._queue.get()
            if isinstance(item, TriptychError):
                raise item
            yield item
            if self._is_last(item):
                return

    def push(self, item: Item | TriptychError) -> None:
        """Take what the rank sent."""
        if isinstance(item, TriptychError) and not self.accepted.done():
            self.accepted.set_exception(item)
        else:
            self._queue.put_nowait(item)

    async def aclose(self) -> None:
        """Abort if unfinished."""
        self._runner.abort(self._request_id)

    async def __aenter__(self) -> RankedStream[Item]:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class RankedRunner(Generic[Item]):
    """A model in a rank group: its life, and the streams of its running requests."""

    def __init__(
        self, config: BaseRunnerConfig, *, program: str, is_last: Callable[[Item], bool]
    ) -> None:
        self._config = config
        self._is_last = is_last
        self._group = RankGroup(
            config, program=program, on_message=self._on_message, on_down=self._on_down
        )
        self._streams: dict[str, RankedStream[Item]] = {}
        self._ranks: dict[str, int] = {}

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self._config.name

    @property
    def version(self) -> str:
        """Which version of the model this is."""
        return self._config.model_version

    @property
    def batch_size(self) -> int:
        """Sequences, inputs or pictures that are computed together."""
        return self._config.places

    @property
    def devices(self) -> list[str]:
        """Where the ranks hold the model; empty until they were ready once."""
        info = self._group.info
        return [] if info is None else info.devices

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

    def abort(self, request_id: str) -> None:
        """Forget a request and tell its rank, if it still runs."""
        rank = self._ranks.get(request_id, 0)
        if self._forget(request_id) is not None and self.health().ready:
            self._group.send(Abort(request_id), rank)

    async def _submit(
        self, request_id: str, message: HostMessage, rank: int = 0
    ) -> RankedStream[Item]:
        """Hand a rank a request and return once it was accepted."""
        if request_id in self._streams:
            raise InvalidRequest(f"request_id {request_id} is already in use", param="request_id")
        self._group.send(message, rank)
        stream = self._streams[request_id] = RankedStream(self, request_id, self._is_last)
        self._ranks[request_id] = rank
        try:
            await stream.accepted
        except BaseException:
            self.abort(request_id)
            raise
        return stream

    def _on_message(self, message: RankMessage) -> None:
        match message:
            case Accepted(request_id, prompt_tokens):
                stream = self._streams.get(request_id)
                if stream is not None and not stream.accepted.done():
                    stream.accepted.set_result(prompt_tokens)
            case Failed(request_id, kind, text, param):
                stream = self._forget(request_id)
                if stream is not None:
                    stream.push(from_wire(kind, text, param))
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    def _deliver(self, request_id: str, item: Item) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.push(item)
            if self._is_last(item):
                self._forget(request_id)

    def _forget(self, request_id: str) -> RankedStream[Item] | None:
        self._ranks.pop(request_id, None)
        return self._streams.pop(request_id, None)

    def _lost(self, reason: str) -> RunnerUnavailable:
        return RunnerUnavailable(
            f"model {self.name} went down with the request in flight: {reason}"
        )

    def _on_down(self, reason: str) -> None:
        streams = list(self._streams.values())
        self._streams.clear()
        self._ranks.clear()
        for stream in streams:
            stream.push(self._lost(reason))
