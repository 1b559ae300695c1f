"""The keys and values of one sequence, layer by layer, on whatever device each layer lives."""

from __future__ import annotations

import torch


class SequenceKV:
    """KV of one sequence: per layer a buffer `[kv_heads, capacity, head_dim]` for each of K and V.

    `length` tokens are committed. Within a step every layer appends the same tokens; the engine
    commits them once the whole forward is done. `capacity` is in tokens and never exceeded.
    """

    __slots__ = ("_keys", "_values", "capacity", "length")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[kv_heads, n, head_dim]` behind what is committed; return all K and V so far."""
        if layer not in self._keys:
            # Pages become resident when written: an early end never pays for the whole capacity.
            self._keys[layer] = key.new_empty(key.shape[0], self.capacity, key.shape[2])
            self._values[layer] = value.new_empty(value.shape[0], self.capacity, value.shape[2])
        end = self.length + key.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self.length : end] = key
        values[:, self.length : end] = value
        return keys[:, :end], values[:, :end]

    def bytes_per_token(self) -> dict[torch.device, int]:
        """Bytes that one more token takes on each device."""
        total: dict[torch.device, int] = {}
        for buffer in [*self._keys.values(), *self._values.values()]:
            size = buffer.shape[0] * buffer.shape[2] * buffer.element_size()
            total[buffer.device] = total.get(buffer.device, 0) + size
        return total
