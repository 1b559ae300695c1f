"""What belongs to one HTTP request: its id, its deadline, and all it must give back at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from api.http.error_shapes import OPENAI, Shape
from runners.contracts.errors import DeadlineExceeded


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """One HTTP request in flight.

    Whatever a handler acquires goes onto `resources`. The outermost middleware closes them when the
    ASGI call ends, however it ends: an async generator that nobody exhausted is otherwise closed
    only when the garbage collector finds it.
    """

    request_id: str
    route: str
    timeout: float
    error_shape: Shape = OPENAI
    arrived: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    resources: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.arrived + self.timeout - asyncio.get_running_loop().time()

    @asynccontextmanager
    async def within_deadline(self) -> AsyncIterator[None]:
        """Abort the block when the request's time is over. Raises: DeadlineExceeded."""
        try:
            async with asyncio.timeout_at(self.arrived + self.timeout) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"the request took longer than the {self.timeout:g} s it may take"
            ) from None


_current: ContextVar[RequestContext] = ContextVar("triptych_request")


def current_request() -> RequestContext:
    """The request that the calling task works for."""
    return _current.get()


def current_request_id() -> str | None:
    """The id of that request; None outside of one."""
    request = _current.get(None)
    return None if request is None else request.request_id


def current_shape() -> Shape:
    """What errors of that request look like."""
    request = _current.get(None)
    return OPENAI if request is None else request.error_shape


def enter_request(context: RequestContext) -> None:
    """Make `context` the current request of this task and those it starts."""
    _current.set(context)
