"""What the host tells the processes of a rank group, and where: files in one private folder."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from runners.config.model import BaseRunnerConfig

SPEC, SOCKET, OUTCOME, LOGS, WORK = "spec.json", "channel.sock", "outcome.json", "logs", "work"


class RankSpec(msgspec.Struct, frozen=True):
    """How to start the ranks of one machine."""

    program: str
    """`module:function`, a `worker.LoadProgram`."""
    config: str
    """RunnerConfig as JSON."""
    world_size: int
    num_threads: int
    """Of each rank."""
    local_world_size: int
    """The ranks of this machine; the group has `world_size`."""
    first_rank: int = 0
    """The first rank of this machine."""
    rendezvous: str | None = None
    """`host:port` where the ranks of several machines meet."""
    gpu_share: tuple[int, int, int] | None = None
    """First GPU, how many, and of how many; None: all there are."""


def spec_of(config: BaseRunnerConfig, program: str) -> RankSpec:
    """How to start this machine's ranks of a model."""
    local = config.local_world_size
    return RankSpec(
        program,
        config.model_dump_json(),
        world_size=config.world_size,
        num_threads=config.num_threads or max(1, _usable_cores() // local),
        local_world_size=local,
        first_rank=config.first_rank,
        rendezvous=config.rendezvous,
        gpu_share=config.gpu_share,
    )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Outcome(msgspec.Struct, frozen=True):
    """Why a rank group ended, written by its launcher."""

    reason: str
    stderr_tail: list[str]
    rank: int | None = None
    """Which one ended first."""


def write_private(path: Path, value: RankSpec | Outcome) -> None:
    """Write JSON that only this user can read, whole or not at all."""
    temporary = path.with_suffix(".part")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(value))
    temporary.replace(path)


def read_spec(run_dir: Path) -> RankSpec:
    """The spec that the host wrote into `run_dir`."""
    return msgspec.json.decode((run_dir / SPEC).read_bytes(), type=RankSpec)


def read_outcome(run_dir: Path) -> Outcome | None:
    """Why the group ended; None if its launcher could not say."""
    try:
        return msgspec.json.decode((run_dir / OUTCOME).read_bytes(), type=Outcome)
    except (OSError, ValueError):
        return None
