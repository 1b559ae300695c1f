"""The number of KV tokens, and whether memory holds what is configured.

`loading` calls it at the start of a rank.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from runners.config.base import TextConfig
from runners.contracts.errors import ConfigError
from runners.rank.memory import Memory, check_fits, machine_memory
from runners.text.model_runner import HFModelRunner, Layout
from runners.text.paging.batch import Batch
from runners.text.paging.blocks import BLOCK_SIZE

KV_SHARE = 0.6
"""Share of the free memory that KV may take by default; activations need some of the rest."""


def kv_tokens(
    model: PreTrainedModel, layout: Layout, config: TextConfig, *, max_context: int
) -> int:
    """The configured KV tokens, or those that fit on the device with the least room.

    Warns if what is configured needs more than what is free, and raises ConfigError if it needs
    more than there is, or if not even one block fits.
    """
    runner = HFModelRunner(model, layout, blocks=1)
    runner.run(Batch([[0]], [0], [[0]]))
    # Ranks share the memory of their machine, but no GPU.
    sizes = {
        device: size * (config.local_world_size if device.type == "cpu" else 1)
        for device, size in runner.bytes_per_token().items()
        if size
    }
    fitting = [int(KV_SHARE * _memory(device).free / size) for device, size in sizes.items()]
    tokens = min([config.max_batch_size * max_context, *fitting])
    logits = 4 * runner.vocab_size  # as float32, in rank 0
    check_fits("max_batch_size", config.max_batch_size, logits, machine_memory())
    if config.max_kv_tokens is None:
        if tokens < BLOCK_SIZE:
            raise ConfigError("no memory is left for the KV cache; choose a smaller model or dtype")
        return tokens
    for device, size in sizes.items():
        check_fits("max_kv_tokens", config.max_kv_tokens, size, _memory(device), str(device))
    return config.max_kv_tokens


def _memory(device: torch.device) -> Memory:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    return machine_memory()
