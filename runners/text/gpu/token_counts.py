"""How often each sequence with penalties has each token, counted on the device.

A step is sampled before the host knows the token of the step before it, so the device counts.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from runners.text.gpu.transfer import Array, to_device
from runners.text.sampling import SamplerState

FIRST_SLOTS = 8
"""Rows of the first tables; they double when they are full."""


class TokenCounts:
    """The tables: a row for each sequence that asks for one, until its state is gone."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.output = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        """How often each token was sampled, `[slots, vocab]`."""
        self.prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        """Whether each token is in the prompt, `[slots, vocab]`."""
        self._free: list[int] = []
        self._slots: weakref.WeakKeyDictionary[SamplerState, int] = weakref.WeakKeyDictionary()
        self._counted: dict[int, int] = {}
        """How many output tokens each row counts."""

    def slot(self, state: SamplerState, index: int) -> int:
        """The row that counts the output tokens before `index`; `add` must follow with that one.

        It is what the device counted, where that is this many tokens. After a step that was
        discarded it is not, and the row is made anew from what the host knows. Raises: ValueError
        if the host does not know them all.
        """
        slot = self._slots.get(state)
        if slot is None:
            slot = self._take(state)
        if self._counted.get(slot) != index:
            if state.output_tokens != index:
                raise ValueError(
                    f"output token {index} cannot be sampled: {state.output_tokens} tokens are "
                    "known, and the device has not counted the rest"
                )
            self._fill(slot, state)
        self._counted[slot] = index + 1
        return slot

    def add(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count a sampled token (int64 `[n]`) in each of the rows `slots` (int64 `[n]`)."""
        ones = torch.ones_like(tokens, dtype=torch.int32)
        self.output.view(-1).scatter_add_(0, slots * self._vocab_size + tokens, ones)

    def _take(self, state: SamplerState) -> int:
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._counted.pop(slot, None)
        self._slots[state] = slot
        # The next sequence's row is filled after all that is queued on the device has read this.
        weakref.finalize(state, self._free.append, slot).atexit = False
        return slot

    def _grow(self) -> None:
        used = len(self.output)
        count = max(FIRST_SLOTS, 2 * used)
        output = self.output.new_zeros(count, self._vocab_size)
        prompt = self.prompt.new_zeros(count, self._vocab_size)
        output[:used], prompt[:used] = self.output, self.prompt
        self.output, self.prompt = output, prompt
        self._free.extend(reversed(range(used, count)))

    def _fill(self, slot: int, state: SamplerState) -> None:
        # Only the repetition penalty looks at the prompt.
        prompt = state.prompt_ids if state.repetition_penalty != 1.0 else []
        ids = np.array(prompt, dtype=np.int64)
        arrays: dict[str, Array] = {
            "prompt": ids[ids < self._vocab_size],  # embeddings may be more than logits
            "output": np.array(list(state.output_counts), dtype=np.int64),
            "counts": np.array(list(state.output_counts.values()), dtype=np.int32),
        }
        tensors = to_device(arrays, self._device)
        self.prompt[slot].zero_().index_fill_(0, tensors["prompt"], True)
        self.output[slot].zero_().index_copy_(0, tensors["output"], tensors["counts"])
