"""The interface between a rank's loop and the program that it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runners.config.model import AccelerateConfig, DeepSpeedConfig, MIIConfig
from runners.contracts.images import ImageModelInfo
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.protocol.messages import (
    HostMessage,
    Progress,
    RankMessage,
)


@dataclass(frozen=True)
class Occupancy:
    """How full a program is."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0


class RankProgram(Protocol):
    """A loaded model that works step by step."""

    @property
    def info(self) -> ModelInfo | ImageModelInfo:
        """What was loaded."""
        ...

    def receive(self, message: HostMessage) -> None:
        """Take a message of the host; called by the reader thread, must not block."""
        ...

    def step(self) -> None:
        """Wait (at most about a second) for work and do one step of it."""
        ...

    def occupancy(self) -> Occupancy:
        """How full it is; called by the heartbeat thread."""
        ...


@dataclass(frozen=True)
class RankContext:
    """What a program needs of the rank it runs in."""

    config: AccelerateConfig | DeepSpeedConfig | MIIConfig
    rank: int
    world_size: int
    num_threads: int
    work_dir: Path
    """A private folder that goes with the rank group."""
    emit: Callable[[RankMessage], None]
    """Sends a message to the host; callable from any thread."""
    rendezvous: str | None = None
    """`host:port` where the ranks of several machines meet."""

    def progress(self, state: RunnerState, detail: str) -> None:
        """Tell the host what the start-up is doing."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            self.emit(Progress(state, detail))


LoadProgram = Callable[[RankContext], RankProgram]
