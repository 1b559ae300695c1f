"""What the host tells the processes of a rank group: files in one private folder."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from runners.config.base import BaseRunnerConfig
from runners.config.model import load_runner_config
from runners.protocol.environment import usable_cores

SPEC, SOCKET, OUTCOME, WORK = "spec.json", "channel.sock", "outcome.json", "work"


class RankSpec(msgspec.Struct, frozen=True):
    """How to start the ranks of one machine."""

    program: str
    """`module:function`, a `rank.program.LoadProgram`."""
    config: msgspec.Raw
    """RunnerConfig as JSON."""
    num_threads: int
    """CPU threads of each rank."""

    def load_config(self) -> BaseRunnerConfig:
        """The RunnerConfig."""
        return load_runner_config(bytes(self.config))


def make_spec(config: BaseRunnerConfig, program: str) -> RankSpec:
    """How to start this machine's ranks of a model."""
    return RankSpec(
        program,
        msgspec.Raw(config.model_dump_json().encode()),
        num_threads=config.num_threads or max(1, usable_cores() // config.local_world_size),
    )


class Outcome(msgspec.Struct, frozen=True):
    """Why a rank group ended, written by its launcher."""

    reason: str
    stderr_tail: list[str]
    rank: int | None = None
    """The rank that ended first."""


def write_private(path: Path, value: msgspec.Struct) -> None:
    """Write JSON that only this user can read, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(value))
    temporary.replace(path)


def read_spec(run_dir: Path) -> RankSpec:
    """The spec that the host wrote into `run_dir`."""
    return msgspec.json.decode((run_dir / SPEC).read_bytes(), type=RankSpec)


def read_outcome(run_dir: Path) -> Outcome | None:
    """Why the group ended; None if its launcher did not write it."""
    try:
        return msgspec.json.decode((run_dir / OUTCOME).read_bytes(), type=Outcome)
    except (OSError, ValueError):
        return None
