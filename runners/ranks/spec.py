"""What the host tells the processes of a rank group, and where: files in one private folder."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

SPEC, SOCKET, OUTCOME, LOGS, WORK = "spec.json", "channel.sock", "outcome.json", "logs", "work"


class RankSpec(msgspec.Struct, frozen=True):
    """How to start a rank group; `program` is a `module:function`, `config` RunnerConfig JSON."""

    program: str
    config: str
    world_size: int
    num_threads: int


class Outcome(msgspec.Struct, frozen=True):
    """Why a rank group ended, written by its launcher."""

    reason: str
    stderr_tail: list[str]


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
