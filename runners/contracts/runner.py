"""What all runners have in common: their states, their health, their interface.

The HTTP layer, the channel and the ranks share these types, so the modules of this package import
neither torch nor server code. Times are in seconds, lengths in tokens of the model's tokenizer.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar


class RunnerState(enum.StrEnum):
    """The state of a rank group."""

    STARTING = "starting"
    LOADING = "loading"
    WARMUP = "warmup"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerHealth:
    """A runner's state, for `/readyz`, the log and the metrics."""

    state: RunnerState
    detail: str
    """One sentence: what the ranks are doing, or why they are not ready."""
    restarts: int = 0
    running: int = 0
    """Requests in the current batch."""
    waiting: int = 0
    """Accepted requests that are not in the batch yet."""
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0

    @property
    def ready(self) -> bool:
        """Whether requests are served now."""
        return self.state is RunnerState.READY


class Event(Protocol):
    """What a rank sends about one request; a request has one or more events."""

    @property
    def request_id(self) -> str:
        """The request that the event belongs to."""
        ...

    @property
    def finished(self) -> bool:
        """Whether it is the last event of its request."""
        ...


EventT_co = TypeVar("EventT_co", bound=Event, covariant=True)
RequestT_contra = TypeVar("RequestT_contra", contravariant=True)


class Stream(Protocol[EventT_co]):
    """The events of one running request. `aclose`, or leaving `async with`, aborts it."""

    @property
    def request_id(self) -> str:
        """The id of the request."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 where the task has none."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The tokens it generates at most; 0 where the task generates none."""
        ...

    def __aiter__(self) -> AsyncIterator[EventT_co]:
        """Yield events up to the last.

        Raises: RunnerUnavailable, ContentFiltered, EngineFailure.
        """
        ...

    async def aclose(self) -> None:
        """Abort if unfinished; the rank frees what the request holds within one step.

        Safe to call twice.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...


class Runner(Protocol[RequestT_contra, EventT_co]):
    """A model in its ranks. All methods belong to one event loop."""

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        ...

    @property
    def version(self) -> str:
        """The version of the model."""
        ...

    @property
    def task(self) -> str:
        """What the model does, such as `text-generation`."""
        ...

    @property
    def max_concurrency(self) -> int:
        """Requests that are computed together."""
        ...

    @property
    def step_timeout(self) -> float:
        """Seconds that one step may take before its rank is replaced."""
        ...

    @property
    def devices(self) -> list[str]:
        """Devices that hold the model; empty before the ranks were ready once."""
        ...

    def health(self) -> RunnerHealth:
        """The state right now; never blocks."""
        ...

    async def start(self) -> None:
        """Begin loading and return at once; `health()` tells when the model is ready."""
        ...

    async def stop(self) -> None:
        """End all ranks; no process of the runner is left running afterwards."""
        ...

    async def submit(self, request: RequestT_contra) -> Stream[EventT_co]:
        """Hand a request to the ranks and return once it was accepted.

        Raises: InvalidRequest, ContextLengthExceeded (nothing was computed), RunnerUnavailable.
        """
        ...
