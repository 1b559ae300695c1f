"""The interface between a rank's loop (`worker`) and the program that it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runners.config.base import BaseRunnerConfig
from runners.contracts.images import ImageModelInfo
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.protocol.messages import HostMessage, Progress, RankMessage

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats of a rank."""


@dataclass(frozen=True)
class Occupancy:
    """The load of a program."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0


class RankProgram(Protocol):
    """A loaded model that works step by step."""

    @property
    def info(self) -> ModelInfo | ImageModelInfo:
        """Facts about the loaded model."""
        ...

    def receive(self, message: HostMessage) -> None:
        """Take a message of the host; called by the reader thread, must not block."""
        ...

    def step(self) -> None:
        """Wait (at most about a second) for work and do one step of it."""
        ...

    def occupancy(self) -> Occupancy:
        """The current load; called by the heartbeat thread."""
        ...


class StepClock:
    """Start of the current step; read by the heartbeat thread."""

    def __init__(self) -> None:
        self._start: float | None = None

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._start = None

    @property
    def age(self) -> float:
        """Its duration in seconds; 0 between steps."""
        start = self._start
        return 0.0 if start is None else time.monotonic() - start


@dataclass(frozen=True)
class RankContext:
    """The rank that a program runs in."""

    config: BaseRunnerConfig
    rank: int
    num_threads: int
    """CPU threads of this rank."""
    work_dir: Path
    """A private folder that is removed with the rank group."""
    emit: Callable[[RankMessage], None]
    """Sends a message to the host; callable from any thread."""

    def progress(self, state: RunnerState, detail: str) -> None:
        """Report the current phase of the start to the host."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            self.emit(Progress(state, detail))


LoadProgram = Callable[[RankContext], RankProgram]
