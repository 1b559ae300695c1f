"""HFModelRunner: one step of a stock Hugging Face causal LM over the tokens of many sequences.

`parity` chooses the layout that is right for an architecture before it serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from runners.text.engine import ModelRunner
from runners.text.padded import PaddedCache
from runners.text.paging.batch import Batch, ForwardContext, forward_context
from runners.text.paging.blocks import BLOCK_SIZE, fewer
from runners.text.paging.kv import KVPool

Layout = Literal["packed", "padded"]
"""How a batch is laid out: all tokens in one row, or one padded row per sequence."""


class HFModelRunner(ModelRunner):
    """A model and its KV cache of `blocks` blocks."""

    def __init__(self, model: PreTrainedModel, layout: Layout, *, blocks: int) -> None:
        self.model: PreTrainedModel = model.train(False)
        self.layout = layout
        self.vocab_size = len(cast(torch.Tensor, model.get_input_embeddings().weight))
        self._pool = KVPool(blocks)
        self._inputs = ForwardInputs.of(model)
        self._length_scale: Any = next(scaled_by_length(model), None)
        self._device = input_device(model)
        self._sampled = torch.empty(0, dtype=torch.int64, device=self._device)

    @override
    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        run = self._run_packed if self.layout == "packed" else self._run_padded
        return run(batch)

    @override
    def feed(self, tokens: torch.Tensor) -> None:
        self._sampled = tokens.to(self._device)

    @override
    def shrink(self) -> int | None:
        if (blocks := fewer(self._pool.blocks)) is None:
            return None
        self._pool = KVPool(blocks)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return blocks

    @override
    def idle(self) -> None:
        pass

    def bytes_per_token(self) -> dict[torch.device, int]:
        """Bytes of KV per token on each device, once a batch has run."""
        sizes = self._pool.bytes_per_block().items()
        return {device: -(-size // BLOCK_SIZE) for device, size in sizes}

    def _run_packed(self, batch: Batch) -> torch.Tensor:
        context = ForwardContext(self._pool, batch)
        segments = context.segments
        ids = [token for tokens in batch.tokens for token in tokens]
        positions = [position for s in segments for position in range(s.past, s.end)]
        last = [
            s.start + s.count - 1
            for s, wanted in zip(segments, batch.wanted, strict=True)
            if wanted
        ]
        token = forward_context.set(context)
        try:
            return self._forward([ids], last, position_ids=[positions], use_cache=False)[0]
        finally:
            forward_context.reset(token)

    def _run_padded(self, batch: Batch) -> torch.Tensor:
        """Decoding sequences run as one batch; each chunk of a prompt runs alone, unpadded."""
        counts = [len(tokens) for tokens in batch.tokens]
        logits: dict[int, torch.Tensor] = {}
        for indices in self._padded_groups(batch):
            group = batch.select(indices)
            context = ForwardContext(self._pool, group)
            cache = PaddedCache(context)
            out = self._forward(
                group.tokens,
                [counts[indices[0]] - 1],
                position_ids=[list(range(s.past, s.end)) for s in context.segments],
                attention_mask=cache.mask().to(self._device),
                past_key_values=cache,
                use_cache=True,
            )
            logits |= zip(indices, out[:, -1], strict=True)
        rows = [logits[i] for i, wanted in enumerate(batch.wanted) if wanted]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def _padded_groups(self, batch: Batch) -> list[list[int]]:
        """The indices of the sequences that may share a forward.

        A model that scales its queries by the length of the cache takes one length for the whole
        batch: only sequences of the same scale may share it.
        """
        width = self._length_scale.floor_scale if self._length_scale is not None else None
        groups: dict[object, list[int]] = {}
        for i, (tokens, past) in enumerate(zip(batch.tokens, batch.past, strict=True)):
            scale = (past + 1) // width if width else 0
            groups.setdefault(scale if len(tokens) == 1 else ("chunk", i), []).append(i)
        return list(groups.values())

    def _forward(
        self,
        ids: list[list[int]],
        rows: list[int],
        *,
        position_ids: list[list[int]],
        **kwargs: object,
    ) -> torch.Tensor:
        """Logits `[len(ids), len(rows), vocab]` of each sequence's `rows`."""
        input_ids = torch.tensor(ids, device=self._device)
        if any(token < 0 for row in ids for token in row):
            input_ids = resolve(input_ids, self._sampled)
        positions = torch.tensor(position_ids, device=self._device)
        kept = torch.tensor(rows, dtype=torch.int64, device=self._device)
        return self._inputs.logits(self.model, input_ids, positions, kept, **kwargs)


@dataclass(frozen=True)
class ForwardInputs:
    """Which inputs the forward of an architecture takes."""

    position_ids: bool
    logits_to_keep: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> ForwardInputs:
        """Those of a model."""
        parameters = inspect.signature(model.forward).parameters
        # Accelerate moves the indices to the first device, while the rows are on the last.
        gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
        return cls(
            position_ids="position_ids" in parameters,
            logits_to_keep="logits_to_keep" in parameters and len(gpus) < 2,
        )

    def logits(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        positions: torch.Tensor,
        kept: torch.Tensor,
        **kwargs: object,
    ) -> torch.Tensor:
        """Logits `[n, len(kept), vocab]` of the rows `kept` of token ids `[n, rows]`."""
        if self.position_ids:
            kwargs["position_ids"] = positions
        if self.logits_to_keep:
            kwargs["logits_to_keep"] = kept
        out: torch.Tensor = model(input_ids=ids, **kwargs).logits
        return out if self.logits_to_keep else out[:, kept.to(out.device)]


def resolve(ids: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """Token ids, in which `-1 - i` stands for `sampled[i]`."""
    return torch.where(ids < 0, sampled[(-1 - ids).clamp_min(0)], ids)


def scaled_by_length(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The attention modules that scale queries by `floor(length / floor_scale)` (Llama 4)."""
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale"):
            yield module


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of inputs: the CPU if all layers are on disk, where `model.device` is meta."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
