"""RaggedEngine: `put(uids, tokens) -> logits` over a stock Hugging Face causal LM.

The interface is that of DeepSpeed FastGen's `InferenceEngineV2` (put, flush, free blocks), so one
scheduler drives every engine. Which forward the architecture gets is proved before it serves
(`proof.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from transformers import PreTrainedModel

from runners.ragged.blocks import BLOCK_SIZE, BlockAllocator, SequenceBlocks
from runners.ragged.kv import KVPool
from runners.ragged.padded import PaddedCache
from runners.ragged.step import Segment, Step, current

Batching = Literal["packed", "padded"]


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


class RaggedEngine:
    """See `Engine`. `kv_tokens` bounds the KV of all sequences together."""

    def __init__(
        self,
        model: PreTrainedModel,
        path: Batching,
        *,
        kv_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        self.model: PreTrainedModel = model.train(False)
        self.path = path
        self.vocab_size = len(cast(torch.Tensor, model.get_input_embeddings().weight))
        self._sequences: dict[int, SequenceBlocks] = {}
        blocks = max(1, kv_tokens // BLOCK_SIZE)
        self._allocator = BlockAllocator(blocks, prefix_caching=prefix_caching)
        self._pool = KVPool(blocks)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_rows = "logits_to_keep" in parameters
        self._device = input_device(model)

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

    @torch.inference_mode()
    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`; returns last-token logits `[n, vocab]`."""
        sequences = [self._sequences[uid] for uid in uids]
        run = self._put_packed if self.path == "packed" else self._put_padded
        logits = run(sequences, tokens)
        for sequence, new in zip(sequences, tokens, strict=True):
            self._allocator.commit(sequence, new)
        return logits.float().cpu()

    def bytes_per_token(self) -> dict[torch.device, int]:
        """Bytes of KV that one token takes on each device, once something was put."""
        sizes = self._pool.bytes_per_block().items()
        return {device: -(-size // BLOCK_SIZE) for device, size in sizes}

    def _put_packed(
        self, sequences: Sequence[SequenceBlocks], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for sequence, new in zip(sequences, tokens, strict=True):
            segments.append(Segment(sequence, len(ids), len(new)))
            positions += range(sequence.length, sequence.length + len(new))
            ids += new
            last.append(len(ids) - 1)
        context = current.set(Step(self._pool, segments))
        try:
            return self._forward([ids], last, position_ids=[positions], use_cache=False)[0]
        finally:
            current.reset(context)

    def _put_padded(
        self, sequences: Sequence[SequenceBlocks], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Single tokens run as one batch; each longer chunk runs alone, without padding."""
        order = range(len(sequences))
        singles = [i for i in order if len(tokens[i]) == 1]
        batches = [singles] if singles else []
        batches += [[i] for i in order if len(tokens[i]) > 1]
        logits: dict[int, torch.Tensor] = {}
        for batch in batches:
            count = len(tokens[batch[0]])
            segments = [Segment(sequences[i], at * count, count) for at, i in enumerate(batch)]
            cache = PaddedCache(Step(self._pool, segments))
            out = self._forward(
                [list(tokens[i]) for i in batch],
                [count - 1],
                position_ids=[list(range(s.past, s.end)) for s in segments],
                attention_mask=cache.mask().to(self._device),
                past_key_values=cache,
                use_cache=True,
            )
            logits |= zip(batch, out[:, -1], strict=True)
        return torch.stack([logits[i] for i in order])

    def _forward(
        self,
        ids: list[list[int]],
        rows: list[int],
        *,
        position_ids: list[list[int]],
        **kwargs: object,
    ) -> torch.Tensor:
        """Logits `[batch, len(rows), vocab]` of the asked-for rows."""
        if self._takes_positions:
            kwargs["position_ids"] = torch.tensor(position_ids, device=self._device)
        wanted = torch.tensor(rows, device=self._device)
        if self._takes_rows:
            kwargs["logits_to_keep"] = wanted
        out = self.model(input_ids=torch.tensor(ids, device=self._device), **kwargs).logits
        logits: torch.Tensor = out if self._takes_rows else out[:, wanted.to(out.device)]
        return logits


def input_device(model: PreTrainedModel) -> torch.device:
    """Where inputs go: on the CPU if every layer is on disk, which makes `model.device` meta."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
