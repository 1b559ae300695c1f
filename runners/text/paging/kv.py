"""The memory of the KV cache: the blocks of every layer, on the device of that layer."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from runners.text.paging.blocks import BLOCK_SIZE

PAD = 32
"""The size of a value vector is padded to a multiple of this, which every vector width divides."""


def padded_size(value_size: int) -> int:
    """Elements that a value vector takes in memory."""
    return -(-value_size // PAD) * PAD


@dataclass(frozen=True, slots=True)
class LayerKV:
    """The blocks of one layer.

    Keys are `[blocks, kv_heads, key_size, BLOCK_SIZE]`: the keys of a block are multiplied with a
    query in one pass. Values are `[blocks, kv_heads, BLOCK_SIZE, padded_size(value_size)]`.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def native(self) -> bool:
        """Whether the CPU kernels can use these blocks."""
        return self.keys.dtype == torch.float32 and self.keys.device.type == "cpu"


class KVPool:
    """The KV of `blocks` blocks in every layer. A layer is allocated when it is first used."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._layers: dict[int, LayerKV] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> LayerKV:
        """The blocks of a layer, allocated for keys and values `[..., kv_heads, n, size]`."""
        if (layer := self._layers.get(index)) is None:
            heads, size = key.shape[-3], padded_size(value.shape[-1])
            layer = LayerKV(
                _zeros(key, self.blocks, heads, key.shape[-1], BLOCK_SIZE),
                _zeros(value, self.blocks, heads, BLOCK_SIZE, size),
            )
            self._layers[index] = layer
        return layer

    def bytes_per_block(self) -> dict[torch.device, int]:
        """Bytes of one block in all layers, per device."""
        return bytes_per_block(t for x in self._layers.values() for t in (x.keys, x.values))


def bytes_per_block(tensors: Iterable[torch.Tensor]) -> dict[torch.device, int]:
    """Bytes of one block in tensors `[blocks, ...]`, per device."""
    total: dict[torch.device, int] = {}
    for tensor in tensors:
        size = tensor[0].numel() * tensor.element_size()
        total[tensor.device] = total.get(tensor.device, 0) + size
    return total


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Zeros of the type and on the device of `like`.

    On a CPU the memory is mapped and not touched: pages become resident when they are written. The
    pages are small, because with huge ones (as NumPy's allocator asks for) all layers clear two
    megabytes each in the same step, which stalls all streams.
    """
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    count = torch.Size(shape).numel() * like.element_size()
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)
