"""Several streams of one request: opened together, merged in the order of what comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

from runners.contracts.errors import EngineFailure

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
S = TypeVar("S", bound="Stream[object]")


class Stream(Protocol[Item_co]):
    """What a runner gives for one request."""

    def __aiter__(self) -> AsyncIterator[Item_co]:
        """Yield what comes, up to the last of it."""
        ...

    async def aclose(self) -> None:
        """Abort if unfinished."""
        ...


async def open_all(openings: Sequence[Awaitable[S]]) -> list[S]:
    """Open all streams at once; if one is refused, none stays open."""
    if len(openings) == 1:
        return [await openings[0]]
    opening = [asyncio.ensure_future(each) for each in openings]
    try:
        return await asyncio.gather(*opening)
    except BaseException:
        for task in opening:
            task.cancel()
        for result in await asyncio.gather(*opening, return_exceptions=True):
            if not isinstance(result, BaseException):
                await result.aclose()
        raise


class Arrivals(Generic[Item]):
    """What comes of several streams, each with the index of its stream; `is_last` tells an end."""

    def __init__(self, streams: Sequence[Stream[Item]], is_last: Callable[[Item], bool]) -> None:
        self._streams = streams
        self._is_last = is_last
        self._queue: asyncio.Queue[tuple[int, Item] | Exception] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []

    async def __aiter__(self) -> AsyncIterator[tuple[int, Item]]:
        """Yield what comes; never ends by itself. Raises: what a stream does."""
        if len(self._streams) == 1:  # no task and no queue for the common case
            async for item in self._streams[0]:
                yield 0, item
            return
        self._pumps = [
            asyncio.create_task(self._pump(index, stream))
            for index, stream in enumerate(self._streams)
        ]
        while True:
            arrival = await self._queue.get()
            if isinstance(arrival, Exception):
                raise arrival
            yield arrival

    async def aclose(self) -> None:
        """Abort what still runs."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    async def _pump(self, index: int, stream: Stream[Item]) -> None:
        try:
            async for item in stream:
                self._queue.put_nowait((index, item))
                if self._is_last(item):
                    return
            raise cut_short()
        except Exception as error:
            self._queue.put_nowait(error)


def cut_short() -> EngineFailure:
    """A stream that ended without its last item."""
    return EngineFailure("the engine ended a sequence without a finish reason")
