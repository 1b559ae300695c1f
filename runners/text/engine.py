"""RaggedEngine: `put(uids, tokens) -> logits` over a stock Hugging Face causal LM.

The interface is that of DeepSpeed FastGen's `InferenceEngineV2` (put, flush, free blocks), so one
scheduler drives every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from runners.text.paging.blocks import BLOCK_SIZE, BlockAllocator, SequenceBlocks
from runners.text.paging.step import StepPlan


class Engine(Protocol):
    """The seam between a scheduler and whatever holds the model."""

    @property
    def total_tokens(self) -> int:
        """Tokens the KV cache holds."""
        ...

    @property
    def free_tokens(self) -> int:
        """Tokens of KV that can still be had, in whole blocks."""
        ...

    def open(self, uid: int, tokens: Sequence[int]) -> int:
        """Begin a sequence that will be fed `tokens`; how many of them need no computing."""
        ...

    def extend(self, uid: int, count: int) -> bool:
        """Make room for `count` more tokens. False, and nothing taken, if there is none."""
        ...

    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`, which has room for them, all in one step.

        Returns float32 logits `[len(uids), vocab]` of each sequence's last token, on the CPU.
        """
        ...

    def flush(self, uid: int) -> None:
        """Forget a sequence and free its KV. Unknown ids are ignored."""
        ...

    def idle(self) -> None:
        """There is nothing to compute for now."""
        ...


class Runs(Protocol):
    """Whatever computes a step: one process's model, or one that is split over several."""

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Float32 logits `[n, vocab]` of each sequence's last token, on the CPU."""
        ...

    def idle(self) -> None:
        """There is nothing to compute for now."""
        ...


class RaggedEngine:
    """See `Engine`. `blocks` bounds the KV of all sequences together; `model` has as many."""

    def __init__(self, model: Runs, *, blocks: int, prefix_caching: bool = True) -> None:
        self.model = model
        self._sequences: dict[int, SequenceBlocks] = {}
        self._allocator = BlockAllocator(blocks, prefix_caching=prefix_caching)

    @property
    def total_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self._allocator.total * BLOCK_SIZE

    @property
    def free_tokens(self) -> int:
        """Tokens of KV that can still be had, in whole blocks."""
        return self._allocator.free * BLOCK_SIZE

    def open(self, uid: int, tokens: Sequence[int]) -> int:
        """Begin a sequence that will be fed `tokens`; how many of them need no computing."""
        self._sequences[uid] = self._allocator.begin(tokens)
        return self._sequences[uid].length

    def extend(self, uid: int, count: int) -> bool:
        """Make room for `count` more tokens. False, and nothing taken, if there is none."""
        return self._allocator.extend(self._sequences[uid], count)

    def flush(self, uid: int) -> None:
        """Forget a sequence and free its KV."""
        if (sequence := self._sequences.pop(uid, None)) is not None:
            self._allocator.release(sequence)

    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`; returns last-token logits `[n, vocab]`."""
        sequences = [self._sequences[uid] for uid in uids]
        plan = StepPlan(
            [list(each) for each in tokens],
            [sequence.length for sequence in sequences],
            [
                s.blocks[: -(-(s.length + len(t)) // BLOCK_SIZE)]
                for s, t in zip(sequences, tokens, strict=True)
            ],
        )
        logits = self.model.run(plan)
        for sequence, new in zip(sequences, tokens, strict=True):
            self._allocator.commit(sequence, new)
        return logits

    def idle(self) -> None:
        """There is nothing to compute for now."""
        self.model.idle()
