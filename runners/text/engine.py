"""The seam between the scheduler and the model: `Engine`, `ModelRunner`, and the paged engine.

The interface of `Engine` is that of DeepSpeed FastGen's `InferenceEngineV2` (put, flush, free
blocks), so that one scheduler drives all engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from typing_extensions import override

from runners.text.paging.batch import Batch
from runners.text.paging.blocks import BLOCK_SIZE, BlockAllocator, SequenceBlocks


class Engine(Protocol):
    """The sequences of a scheduler and their KV cache. A sequence has an id, `uid`."""

    @property
    def total_tokens(self) -> int:
        """Capacity of the KV cache in tokens."""
        ...

    @property
    def free_tokens(self) -> int:
        """Tokens of KV that can be allocated, in whole blocks."""
        ...

    def open(self, uid: int, tokens: Sequence[int]) -> int:
        """Begin a sequence that starts with `tokens`.

        Returns: how many of them are in the KV cache already.
        """
        ...

    def extend(self, uid: int, count: int) -> bool:
        """Allocate KV for `count` more tokens. False, with nothing allocated, if too little is
        free."""
        ...

    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`, all in one step; their KV is allocated.

        Returns: float32 logits `[len(uids), vocab]` of each sequence's last token, on the CPU.
        """
        ...

    def flush(self, uid: int) -> None:
        """Remove a sequence and free its KV. Unknown ids are ignored."""
        ...

    def idle(self) -> None:
        """Called instead of a step while there is no sequence."""
        ...


class ModelRunner(Protocol):
    """Computes a batch, with a model in this process or split over several."""

    def run(self, batch: Batch) -> torch.Tensor:
        """Float32 logits `[n, vocab]` of each sequence's last token, on the CPU."""
        ...

    def idle(self) -> None:
        """Called instead of `run` while there is no batch."""
        ...


class PagedEngine(Engine):
    """An engine with block tables over a model that has `blocks` KV blocks."""

    def __init__(self, model: ModelRunner, *, blocks: int, prefix_caching: bool = True) -> None:
        self.model = model
        self._sequences: dict[int, SequenceBlocks] = {}
        self._allocator = BlockAllocator(blocks, prefix_caching=prefix_caching)

    @property
    @override
    def total_tokens(self) -> int:
        return self._allocator.total * BLOCK_SIZE

    @property
    @override
    def free_tokens(self) -> int:
        return self._allocator.free * BLOCK_SIZE

    @override
    def open(self, uid: int, tokens: Sequence[int]) -> int:
        self._sequences[uid] = self._allocator.begin(tokens)
        return self._sequences[uid].length

    @override
    def extend(self, uid: int, count: int) -> bool:
        return self._allocator.extend(self._sequences[uid], count)

    @override
    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        sequences = [self._sequences[uid] for uid in uids]
        batch = Batch(
            [list(each) for each in tokens],
            [sequence.length for sequence in sequences],
            [
                s.blocks[: -(-(s.length + len(t)) // BLOCK_SIZE)]
                for s, t in zip(sequences, tokens, strict=True)
            ],
        )
        logits = self.model.run(batch)
        for sequence, new in zip(sequences, tokens, strict=True):
            self._allocator.commit(sequence, new)
        return logits

    @override
    def flush(self, uid: int) -> None:
        if (sequence := self._sequences.pop(uid, None)) is not None:
            self._allocator.release(sequence)

    @override
    def idle(self) -> None:
        self.model.idle()
