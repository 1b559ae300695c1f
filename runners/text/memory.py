"""The number of KV tokens, and whether memory holds what is configured.

`loading` calls it at the start of a rank.
"""

from __future__ import annotations

import gc
from array import array

import torch
from transformers import PreTrainedModel

from runners.config.base import TextConfig
from runners.contracts.errors import ConfigError
from runners.contracts.text import SamplingParams
from runners.hf.models import SamplingDefaults
from runners.rank.memory import Memory, check_fits, gpu_memory_share, machine_memory
from runners.text.execution import Execution, GPUExecution
from runners.text.model_runner import Layout
from runners.text.paging.batch import Batch
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.sampling import SamplerState

KV_SHARE = 0.6
"""Share of a CPU's free memory that KV may take by default; activations need some of the rest."""


def kv_tokens(
    model: PreTrainedModel,
    layout: Layout,
    config: TextConfig,
    *,
    max_context: int,
    execution: Execution,
) -> int:
    """The configured KV tokens, or those that fit on the device with the least room.

    Warns if what is configured needs more than what is free, and raises ConfigError if it needs
    more than there is, or if not even one block fits.
    """
    on_gpu = isinstance(execution, GPUExecution)
    # On a GPU, the allocator keeps what the largest step takes, and the rest is for KV.
    step = first_steps(1, 1)
    if on_gpu:
        rows = max(config.max_step_tokens, config.max_batch_size)
        step = first_steps(config.max_batch_size, min(max_context, rows // config.max_batch_size))
    runner = execution.runner(model, layout, blocks=sum(map(len, step.block_tables)))
    logits = runner.run(step)
    if on_gpu:
        # Drawing from all tokens takes the most memory of all ways to sample.
        params = SamplingParams(temperature=1.0, top_p=0.5)
        states = [
            SamplerState(params, SamplingDefaults(), [], frozenset()) for _ in range(len(logits))
        ]
        execution.sampler().launch(logits, states, [0] * len(states)).result()
    del logits
    # Ranks share the memory of their machine, but no GPU.
    sizes = {
        device: size * (config.local_world_size if device.type == "cpu" else 1)
        for device, size in runner.bytes_per_token().items()
        if size
    }
    vocab_size = runner.vocab_size
    del runner
    memories = {device: _memory(device, config) for device in sizes}
    fitting = [
        int((KV_SHARE if device.type == "cpu" else 1.0) * memories[device].free / size)
        for device, size in sizes.items()
    ]
    tokens = min([config.max_batch_size * max_context, *fitting])
    row = 4 * vocab_size  # logits as float32, in rank 0
    check_fits("max_batch_size", config.max_batch_size, row, machine_memory())
    if config.max_kv_tokens is None:
        if tokens < BLOCK_SIZE:
            raise ConfigError("no memory is left for the KV cache; choose a smaller model or dtype")
        return tokens
    for device, size in sizes.items():
        check_fits("max_kv_tokens", config.max_kv_tokens, size, memories[device], str(device))
    return config.max_kv_tokens


def first_steps(sequences: int, tokens: int) -> Batch:
    """The first step of sequences that have the same number of tokens."""
    blocks = -(-tokens // BLOCK_SIZE)
    return Batch(
        [[0] * tokens] * sequences,
        [0] * sequences,
        [array("i", range(i * blocks, (i + 1) * blocks)) for i in range(sequences)],
        [True] * sequences,
    )


def release_cache() -> None:
    """Return to the GPUs what the allocator keeps of the memory that checks took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory(device: torch.device, config: TextConfig) -> Memory:
    """What a device has for KV: on a GPU, of the model's share, without the graphs to come."""
    if device.type != "cuda":
        return machine_memory()
    free, total = torch.cuda.mem_get_info(device)
    share = int(gpu_memory_share(config) * total)
    graphs = config.graph_memory << 20 if config.cuda_graphs else 0
    room = min(share - torch.cuda.memory_reserved(device), free)
    return Memory(share, max(0, room - graphs))
