"""The memory of this machine, or of the container that the rank is in, and what must fit it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from runners.config.base import BaseRunnerConfig
from runners.contracts.errors import ConfigError
from runners.protocol.environment import SHARED_GPUS

logger = logging.getLogger("triptych.rank")

GPU_MEMORY_SHARE = 0.9
"""The rest is for CUDA's own memory and for what fragmentation wastes."""
CGROUPS = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")


class Memory(NamedTuple):
    """In bytes."""

    total: int
    free: int
    """Includes what the kernel can reclaim, such as the page cache of weight files."""


def machine_memory(cgroups: Path = CGROUPS, process_groups: Path = PROCESS_CGROUPS) -> Memory:
    """The least of the machine and of the control groups of this process, versions 1 and 2.

    `cgroups` is where these are mounted, `process_groups` the file that names those of the process.
    """
    machine = psutil.virtual_memory()
    limits = [Memory(machine.total, machine.available), *_group_memories(cgroups, process_groups)]
    return Memory(min(m.total for m in limits), max(0, min(m.free for m in limits)))


def gpu_memory_share(config: BaseRunnerConfig) -> float:
    """The share of each GPU's memory that the model of this rank may take."""
    if config.gpu_memory_share is not None:
        return config.gpu_memory_share
    share = config.gpu_share
    if share is None or SHARED_GPUS not in os.environ:
        return GPU_MEMORY_SHARE
    return GPU_MEMORY_SHARE * share.size / share.total


def check_fits(field: str, count: int, size: int, memory: Memory, device: str = "cpu") -> None:
    """Check that memory holds what a field of the config allows: `count` times `size` bytes.

    Warns if that is more than what is free. Raises: ConfigError if it is more than there is.
    """
    needed = count * size
    reason = f"{count} need {_gib(needed)} of memory on {device}, which has {_gib(memory.total)}"
    if needed > memory.total:
        raise ConfigError(reason, field=field)
    if needed > memory.free:
        logger.warning("%s: %s, of which %s are free", field, reason, _gib(memory.free))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _group_memories(cgroups: Path, process_groups: Path) -> Iterator[Memory]:
    try:
        lines = process_groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, read = cgroups, _version_2
        elif "memory" in controllers.split(","):
            top, read = cgroups / "memory", _version_1
        else:
            continue
        for folder in _with_parents(top, path):
            try:
                yield from read(folder)
            except OSError:  # the root group has no limit
                continue


def _with_parents(top: Path, path: str) -> list[Path]:
    """The folders of a group and of those around it; a container may see only the outermost."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [top.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def _version_2(folder: Path) -> Iterator[Memory]:
    limit = (folder / "memory.max").read_text().strip()
    if limit != "max":
        used = int((folder / "memory.current").read_text())
        reclaimable = _statistics(folder).get("inactive_file", 0)
        yield Memory(int(limit), int(limit) - used + reclaimable)


def _version_1(folder: Path) -> Iterator[Memory]:
    # Without a limit both are near 2**63. The second includes groups that a container cannot see.
    statistics = _statistics(folder)
    own_limit = int((folder / "memory.limit_in_bytes").read_text())
    limit = min(own_limit, statistics.get("hierarchical_memory_limit", own_limit))
    used = int((folder / "memory.usage_in_bytes").read_text())
    reclaimable = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
    yield Memory(limit, limit - used + reclaimable)


def _statistics(folder: Path) -> dict[str, int]:
    lines = (folder / "memory.stat").read_text().splitlines()
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
