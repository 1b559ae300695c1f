"""Forward: one step of a stock Hugging Face causal LM over the tokens of many sequences.

Which of the two paths an architecture gets is proved before it serves (`proof.py`).
"""

from __future__ import annotations

import inspect
from typing import Literal, cast

import torch
from transformers import PreTrainedModel

from runners.text.padded import PaddedCache
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.paging.kv import KVPool
from runners.text.paging.step import Segment, Step, StepPlan, current

Batching = Literal["packed", "padded"]


class Forward:
    """A model with the KV of `blocks` blocks, which only the plans it is given tell apart."""

    def __init__(self, model: PreTrainedModel, path: Batching, *, blocks: int) -> None:
        self.model: PreTrainedModel = model.train(False)
        self.path = path
        self.vocab_size = len(cast(torch.Tensor, model.get_input_embeddings().weight))
        self._pool = KVPool(blocks)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_rows = "logits_to_keep" in parameters
        self._device = input_device(model)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Float32 logits `[n, vocab]` of each sequence's last token, on the CPU."""
        run = self._packed if self.path == "packed" else self._padded
        return run(plan).float().cpu()

    def idle(self) -> None:
        """Nobody waits for this process."""

    def bytes_per_token(self) -> dict[torch.device, int]:
        """Bytes of KV that one token takes on each device, once something was run."""
        sizes = self._pool.bytes_per_block().items()
        return {device: -(-size // BLOCK_SIZE) for device, size in sizes}

    def _packed(self, plan: StepPlan) -> torch.Tensor:
        segments = plan.segments()
        ids = [token for tokens in plan.tokens for token in tokens]
        positions = [position for s in segments for position in range(s.past, s.end)]
        last = [s.start + s.count - 1 for s in segments]
        context = current.set(Step(self._pool, segments))
        try:
            return self._forward([ids], last, position_ids=[positions], use_cache=False)[0]
        finally:
            current.reset(context)

    def _padded(self, plan: StepPlan) -> torch.Tensor:
        """Single tokens run as one batch; each longer chunk runs alone, without padding."""
        order = range(len(plan.tokens))
        singles = [i for i in order if len(plan.tokens[i]) == 1]
        batches = [singles] if singles else []
        batches += [[i] for i in order if len(plan.tokens[i]) > 1]
        logits: dict[int, torch.Tensor] = {}
        for batch in batches:
            count = len(plan.tokens[batch[0]])
            segments = [
                Segment(at * count, count, plan.past[i], plan.tables[i])
                for at, i in enumerate(batch)
            ]
            cache = PaddedCache(Step(self._pool, segments))
            out = self._forward(
                [plan.tokens[i] for i in batch],
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
