"""The context of one HTTP request: its id, its deadline, and what is released at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count

from api.http.error_formats import OPENAI, ErrorFormat
from runners.contracts.errors import DeadlineExceeded, TriptychError

_part_numbers = count(1)


@dataclass(slots=True, kw_only=True, eq=False)
class RequestContext:
    """One HTTP request in flight.

    Whatever a handler acquires goes onto `resources`. The outermost middleware closes them when the
    ASGI call ends, however it ends: an async generator that is not exhausted is otherwise closed
    only by the garbage collector.
    """

    request_id: str
    route: str
    """The label of its route in the metrics."""
    timeout: float
    """Seconds from arrival to deadline."""
    error_format: ErrorFormat = OPENAI
    is_admitted: bool = False
    """Whether it has its place in the queue before its handler runs, as a submitted job has."""
    arrived: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    """Time of the event loop at its arrival, in seconds."""
    resources: AsyncExitStack = field(default_factory=AsyncExitStack)
    _limits: set[asyncio.Timeout] = field(default_factory=set)
    """The blocks within the deadline that run now."""
    _abort_reason: TriptychError | None = None

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.arrived + self.timeout - asyncio.get_running_loop().time()

    def new_part_id(self) -> str:
        """An id for a sequence, image or input of this request.

        It is unique in this process: clients may reuse a request id.
        """
        return f"{self.request_id}-{next(_part_numbers)}"

    def abort(self, reason: TriptychError) -> None:
        """End the request's work with an error, as at its deadline."""
        self._abort_reason = reason
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)

    @asynccontextmanager
    async def within_deadline(self) -> AsyncIterator[None]:
        """Abort the block at the request's deadline.

        Raises: DeadlineExceeded, or the reason that `abort` was given.
        """
        when = 0.0 if self._abort_reason is not None else self.arrived + self.timeout
        try:
            async with asyncio.timeout_at(when) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._abort_reason or DeadlineExceeded(
                f"the request exceeded its time limit of {self.timeout:g} s"
            ) from None


_current: ContextVar[RequestContext] = ContextVar("triptych_request")
_in_flight: set[RequestContext] = set()


def current_request() -> RequestContext:
    """The request that the calling task works for."""
    return _current.get()


def current_request_id() -> str | None:
    """The id of that request; None outside of one."""
    request = _current.get(None)
    return None if request is None else request.request_id


def current_error_format() -> ErrorFormat:
    """The format of that request's errors."""
    request = _current.get(None)
    return OPENAI if request is None else request.error_format


def enter_request(context: RequestContext) -> None:
    """Make `context` the current request of this task and those it starts.

    It is in flight until its resources are closed.
    """
    _current.set(context)
    _in_flight.add(context)
    context.resources.callback(_in_flight.discard, context)


def abort_requests(reason: TriptychError) -> None:
    """End the work of all requests in flight with an error."""
    for context in list(_in_flight):
        context.abort(reason)
