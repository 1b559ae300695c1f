"""What all runners have in common: their states, their health, their interface."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol


class RunnerState(enum.StrEnum):
    """Where a rank group is in its life."""

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
    """One sentence: what it is doing, or why it is not ready."""
    restarts: int = 0
    running: int = 0
    """Sequences being generated."""
    waiting: int = 0
    """Accepted sequences that wait for room."""
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0

    @property
    def ready(self) -> bool:
        """Whether requests are served now."""
        return self.state is RunnerState.READY


class Runner(Protocol):
    """What all runners have in common. All methods belong to one event loop."""

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        ...

    @property
    def version(self) -> str:
        """Which version of the model this is."""
        ...

    @property
    def batch_size(self) -> int:
        """Sequences, inputs or pictures that are computed together."""
        ...

    @property
    def devices(self) -> list[str]:
        """Where the ranks hold the model; empty until they were ready once."""
        ...

    def health(self) -> RunnerHealth:
        """The state right now; never blocks."""
        ...

    async def start(self) -> None:
        """Begin loading and return at once; `health()` tells when it is ready."""
        ...

    async def stop(self) -> None:
        """End all ranks; nothing of the runner's is left running afterwards."""
        ...
