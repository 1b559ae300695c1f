"""How many tokens of KV the free memory holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from runners.contracts.errors import ConfigError
from runners.text.forward import Batching, Forward
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.paging.step import StepPlan

KV_SHARE = 0.6
"""Share of the free memory that KV may take by default; the rest is for activations and others."""


def default_kv_tokens(model: PreTrainedModel, path: Batching, useful: int, *, sharing: int) -> int:
    """As many tokens as the free memory of the tightest device holds, at most `useful`.

    `sharing` ranks have the CPU's memory in common.
    """
    forward = Forward(model, path, blocks=1)
    forward.run(StepPlan([[0]], [0], [[0]]))
    per_token = forward.bytes_per_token()
    room = [
        int(KV_SHARE * _free_bytes(d) / (sharing if d.type == "cpu" else 1) / size)
        for d, size in per_token.items()
        if size
    ]
    fits = min([useful, *room])
    if fits < BLOCK_SIZE:
        raise ConfigError("no memory is left for the KV cache; choose a smaller model or dtype")
    return fits


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if _linux() else []:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *_cgroup_room()])


def _cgroup_room() -> list[int]:
    """What a container's memory limit leaves (cgroup v2); empty without a limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = Path("/sys/fs/cgroup/memory.stat").read_text()
    except OSError:
        return []
    # The page cache of the weights counts as used, but gives way.
    cached = next(
        (int(x.split()[1]) for x in stat.splitlines() if x.startswith("inactive_file")), 0
    )
    return [] if limit == "max" else [max(0, int(limit) - used + cached)]


def _linux() -> bool:
    return Path("/proc/meminfo").is_file()
