"""The seam between the scheduler and the model: `Engine`, `ModelRunner`, and the paged engine.

The interface of `Engine` follows DeepSpeed FastGen's `InferenceEngineV2` (flush, free blocks), so
that one scheduler drives all engines. A step is submitted, and its tokens are fetched later: on a
GPU the next step is submitted before the tokens of the last one are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from typing_extensions import override

from runners.text.paging.batch import Batch
from runners.text.paging.blocks import BLOCK_SIZE, PENDING, BlockAllocator, SequenceBlocks
from runners.text.samplers import SampledRow, SampledStep, Sampler, UnsampledStep
from runners.text.sampling import SamplerState


@dataclass(frozen=True, slots=True)
class Row:
    """What a step computes of one sequence."""

    uid: int
    tokens: Sequence[int]
    """Its next tokens; the last may be `PENDING`, for the one that the step before samples."""
    sampler: SamplerState | None = None
    """Samples the token that follows; None if none is to be sampled."""
    index: int = 0
    """Number of output tokens before the sampled one."""


class PendingStep(Protocol):
    """A step that was submitted."""

    def result(self) -> list[SampledRow]:
        """What was sampled for each row with a sampler, in order. Waits for the step."""
        ...


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

    @property
    def overlaps(self) -> bool:
        """Whether a step may be submitted before the tokens of the last one are known."""
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

    def submit(self, rows: Sequence[Row]) -> PendingStep:
        """Begin a step that appends each row's tokens to its sequence; their KV is allocated.

        Raises: torch.OutOfMemoryError if the device has no memory for it.
        """
        ...

    def flush(self, uid: int) -> None:
        """Remove a sequence and free its KV. Unknown ids are ignored."""
        ...

    def shrink(self) -> bool:
        """After a step had no memory: make the KV cache smaller. No sequence may be left.

        Returns: False if that is impossible.
        """
        ...

    def idle(self) -> None:
        """Called instead of a step while there is no sequence."""
        ...


class ModelRunner(Protocol):
    """Computes a batch, with a model in this process or split over several."""

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits `[m, vocab]` of the last tokens of the `m` sequences that want them, on any
        device."""
        ...

    def feed(self, tokens: torch.Tensor) -> None:
        """Remember the tokens `[m]` that were sampled after a batch: the next one refers to
        them."""
        ...

    def shrink(self) -> int | None:
        """Make the KV cache smaller, which loses its content.

        Returns: the number of its blocks; None if that is impossible.
        """
        ...

    def idle(self) -> None:
        """Called instead of `run` while there is no batch."""
        ...


class PagedEngine(Engine):
    """An engine with block tables over a model that has `blocks` KV blocks.

    With `overlap`, tokens stay on the model's device between steps.
    """

    def __init__(
        self,
        model: ModelRunner,
        sampler: Sampler,
        *,
        blocks: int,
        prefix_caching: bool = True,
        overlap: bool = False,
    ) -> None:
        self.model = model
        self._sampler = sampler
        self._overlap = overlap
        self._prefix_caching = prefix_caching
        self._sequences: dict[int, SequenceBlocks] = {}
        self._allocator = BlockAllocator(blocks, prefix_caching=prefix_caching)
        self._sampled: dict[int, int] = {}
        """The sequences that the last step samples for, each with its place among them."""

    @property
    @override
    def total_tokens(self) -> int:
        return self._allocator.total * BLOCK_SIZE

    @property
    @override
    def free_tokens(self) -> int:
        return self._allocator.free * BLOCK_SIZE

    @property
    @override
    def overlaps(self) -> bool:
        return self._overlap

    @override
    def open(self, uid: int, tokens: Sequence[int]) -> int:
        self._sequences[uid] = self._allocator.begin(tokens)
        return self._sequences[uid].length

    @override
    def extend(self, uid: int, count: int) -> bool:
        return self._allocator.extend(self._sequences[uid], count)

    @override
    def submit(self, rows: Sequence[Row]) -> PendingStep:
        logits = self._run(rows, [row.sampler is not None for row in rows])
        sampled = [row for row in rows if row.sampler is not None]
        step = launch(self._sampler, logits, sampled)
        if self._overlap and sampled:
            self.model.feed(step.tokens)
        self._sampled = {row.uid: i for i, row in enumerate(sampled)}
        return _PagedStep(self, sampled, step)

    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`, all in one step; their KV is allocated.

        Returns: float32 logits `[len(uids), vocab]` of each sequence's last token, on the CPU.
        """
        rows = [Row(*each) for each in zip(uids, tokens, strict=True)]
        return self._run(rows, [True] * len(rows)).float().cpu()

    def resolve(self, uid: int, token: int) -> None:
        """Tell which token was sampled for a sequence, if it is there and was extended by it."""
        if (sequence := self._sequences.get(uid)) is not None:
            self._allocator.resolve(sequence, token)

    @override
    def flush(self, uid: int) -> None:
        if (sequence := self._sequences.pop(uid, None)) is not None:
            self._allocator.release(sequence)

    @override
    def shrink(self) -> bool:
        if self._sequences or (blocks := self.model.shrink()) is None:
            return False
        self._allocator = BlockAllocator(blocks, prefix_caching=self._prefix_caching)
        return True

    @override
    def idle(self) -> None:
        self.model.idle()

    def _run(self, rows: Sequence[Row], wanted: list[bool]) -> torch.Tensor:
        sequences = [self._sequences[row.uid] for row in rows]
        batch = Batch(
            [self._ids(row) for row in rows],
            [sequence.length for sequence in sequences],
            [
                s.blocks[: -(-(s.length + len(row.tokens)) // BLOCK_SIZE)]
                for s, row in zip(sequences, rows, strict=True)
            ],
            wanted,
            shared=self._overlap,
        )
        logits = self.model.run(batch)
        for sequence, row in zip(sequences, rows, strict=True):
            self._allocator.commit(sequence, row.tokens)
        return logits

    def _ids(self, row: Row) -> list[int]:
        """Its tokens; `-1 - i` stands for the token that the last step sampled as its number i."""
        if row.tokens[-1] != PENDING:
            return list(row.tokens)
        return [*row.tokens[:-1], -1 - self._sampled[row.uid]]


@dataclass(frozen=True)
class _PagedStep(PendingStep):
    engine: PagedEngine
    rows: Sequence[Row]
    step: SampledStep

    @override
    def result(self) -> list[SampledRow]:
        results = self.step.result()
        if not self.engine.overlaps:
            return results
        for row, sampled in zip(self.rows, results, strict=True):
            if sampled.token is not None:
                self.engine.resolve(row.uid, sampled.token)
        return results


def launch(sampler: Sampler, logits: torch.Tensor, rows: Sequence[Row]) -> SampledStep:
    """Sample for rows that have samplers, from logits `[len(rows), vocab]`."""
    states = [row.sampler for row in rows if row.sampler is not None]
    if not states:
        return UnsampledStep(logits.device)
    return sampler.launch(logits, states, [row.index for row in rows])
