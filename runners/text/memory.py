"""The number of KV tokens that fit in free memory. `loading` calls it at the start of a rank."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from runners.contracts.errors import ConfigError
from runners.text.model_runner import HFModelRunner, Layout
from runners.text.paging.batch import Batch
from runners.text.paging.blocks import BLOCK_SIZE

KV_SHARE = 0.6
"""Share of the free memory that KV may take by default; activations need some of the rest."""

CGROUP = Path("/sys/fs/cgroup")


def default_kv_tokens(
    model: PreTrainedModel, layout: Layout, max_useful: int, *, ranks: int
) -> int:
    """The KV tokens that fit on the device with the least room, at most `max_useful`.

    `ranks` is the number of ranks that share this machine's memory.
    Raises: ConfigError if not even one block fits.
    """
    runner = HFModelRunner(model, layout, blocks=1)
    runner.run(Batch([[0]], [0], [[0]]))
    fitting = [
        int(KV_SHARE * _free_bytes(device) / (ranks if device.type == "cpu" else 1) / size)
        for device, size in runner.bytes_per_token().items()
        if size
    ]
    tokens = min([max_useful, *fitting])
    if tokens < BLOCK_SIZE:
        raise ConfigError("no memory is left for the KV cache; choose a smaller model or dtype")
    return tokens


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([psutil.virtual_memory().available, *_cgroup_free()])


def _cgroup_free() -> list[int]:
    """Bytes below a container's memory limit (cgroup v2); empty without a limit."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        statistics = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return []
    # Memory in use includes the page cache of the weight files, which the kernel can reclaim.
    reclaimable = next((int(x.split()[1]) for x in statistics if x.startswith("inactive_file")), 0)
    return [] if limit == "max" else [max(0, int(limit) - used + reclaimable)]
