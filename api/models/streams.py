"""Several streams of one request: opened together, merged in the order in which events arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Generic, TypeVar

from runners.contracts.errors import EngineFailure
from runners.contracts.runner import Event, Stream

EventT = TypeVar("EventT", bound=Event)
StreamT = TypeVar("StreamT", bound=Stream[Any])


async def open_all(openings: Sequence[Awaitable[StreamT]]) -> list[StreamT]:
    """Open all streams concurrently; if one is refused, all are closed."""
    if len(openings) == 1:
        return [await openings[0]]
    tasks = [asyncio.ensure_future(opening) for opening in openings]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, BaseException):
                await result.aclose()
        raise


FAIR_EVENTS = 16
"""Events that are taken in a row, if there are as many, before other requests get their turn."""


class MergedStream(Generic[EventT]):
    """The events of several streams, each with the index of its stream."""

    def __init__(self, streams: Sequence[Stream[EventT]]) -> None:
        self._streams = streams
        self._only = aiter(streams[0]) if len(streams) == 1 else None
        self._queue: asyncio.Queue[tuple[int, EventT] | Exception] = asyncio.Queue(FAIR_EVENTS)
        self._pumps: list[asyncio.Task[None]] = []
        self._taken = 0

    async def next(self) -> tuple[int, EventT]:
        """The next event, with the index of its stream; not to be called after the last.

        Raises: what a stream raises, EngineFailure if one ends without its last event.
        """
        if self._only is not None:  # the common case needs no task and no queue
            self._taken += 1
            if self._taken % FAIR_EVENTS == 0:
                await asyncio.sleep(0)
            event = await anext(self._only, None)
            if event is None:
                raise truncated()
            return 0, event
        if not self._pumps:
            self._pumps = [
                asyncio.create_task(self._pump(index, stream))
                for index, stream in enumerate(self._streams)
            ]
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def aclose(self) -> None:
        """Abort what still runs."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    async def _pump(self, index: int, stream: Stream[EventT]) -> None:
        try:
            async for event in stream:
                await self._queue.put((index, event))
                if event.finished:
                    return
            raise truncated()
        except Exception as error:
            await self._queue.put(error)


def truncated() -> EngineFailure:
    """A stream ended without its last event."""
    return EngineFailure("the engine ended a request without a result")
