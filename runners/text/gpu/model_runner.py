"""GPUModelRunner: one packed step of a stock Hugging Face causal LM on GPUs.

All rows of a step run in one forward, with one attention call per layer over the pages of the KV
cache. A step of decoding sequences is padded to one of a few sizes and replayed as a graph. With
`attention_kernel` set to `torch` or `triton` the same path runs on a CPU, with the same buffers and
recorded graphs: that is how it is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from runners.text.engine import ModelRunner
from runners.text.gpu.attention import Backend
from runners.text.gpu.graphs import GraphCache, padded_sizes
from runners.text.gpu.kv import PagePool
from runners.text.gpu.step import PinnedCopy, StepContext, StepLimits, arrays_of
from runners.text.model_runner import ForwardInputs, input_device, resolve
from runners.text.paging.batch import Batch, forward_context
from runners.text.paging.blocks import BLOCK_SIZE


@dataclass(frozen=True)
class GraphOptions:
    """Whether decode steps run as graphs."""

    max_bytes: int
    """Memory of all graphs."""
    agree: Callable[[bool], bool] = lambda success: success
    """Has all ranks that hold the model decide alike."""


class GPUModelRunner(ModelRunner):
    """A model and its KV cache of `blocks` blocks; `graphs` is None to run every step eagerly."""

    def __init__(
        self,
        model: PreTrainedModel,
        backend: Backend,
        limits: StepLimits,
        *,
        blocks: int,
        graphs: GraphOptions | None,
    ) -> None:
        self.model: PreTrainedModel = model.train(False)
        self.device = input_device(model)
        self.vocab_size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        self._limits = limits
        self._inputs = ForwardInputs.of(model)
        self._context = StepContext(PagePool(blocks), backend, limits)
        numbers = 2 * limits.rows + limits.sequences
        self._numbers = torch.zeros(numbers, dtype=torch.int64, device=self.device)
        self._copy = PinnedCopy(numbers, self.device)
        self._sampled = torch.zeros(limits.sequences, dtype=torch.int64, device=self.device)
        self._logits: torch.Tensor | None = None
        self.graphs: GraphCache | None = None
        if graphs is not None:
            self.graphs = GraphCache(
                self.device,
                padded_sizes(limits.sequences),
                max_bytes=graphs.max_bytes,
                agree=graphs.agree,
            )

    @override
    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        decoding = all(len(tokens) == 1 for tokens in batch.tokens) and all(batch.wanted)
        if self.graphs is None or not decoding:
            rows, kept = self._fill(batch, len(batch.tokens))
            return self._forward(rows, kept)
        size = self.graphs.padded(len(batch.tokens))
        self._fill(batch, size)
        if (graph := self.graphs.get(size)) is None:
            logits = self._decode(size)
            self._capture(size)
        else:
            graph.replay()
            logits = graph.output
        return logits[: len(batch.tokens)]

    @override
    def feed(self, tokens: torch.Tensor) -> None:
        self._sampled[: len(tokens)].copy_(tokens, non_blocking=True)

    @override
    @torch.inference_mode()
    def idle(self) -> None:
        """Captures the next graph, so that a later step need not."""
        if self.graphs is not None and (size := self.graphs.missing()) is not None:
            self._fill(Batch([], [], [], []), size)
            self._decode(size)
            self._capture(size)

    @override
    def shrink(self) -> int | None:
        blocks = self._context.pool.blocks * 9 // 10
        if blocks < 1:
            return None
        if self.graphs is not None:
            self.graphs.clear()
        self._context.pool = PagePool(blocks)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return blocks

    def bytes_per_token(self) -> dict[torch.device, int]:
        """Bytes of KV per token on each device, once a batch has run."""
        sizes = self._context.pool.bytes_per_block().items()
        return {device: -(-size // BLOCK_SIZE) for device, size in sizes}

    def _fill(self, batch: Batch, sequences: int) -> tuple[int, int]:
        """Begin to copy a batch, padded to a number of sequences, to the devices.

        Returns: how many rows it has, and how many of them have wanted logits.
        """
        scratch = self._context.pool.scratch_page
        arrays = arrays_of(batch, sequences=sequences, scratch_page=scratch)
        rows, kept, room = arrays.rows, len(arrays.kept), self._limits.rows
        numbers = self._copy.next()
        numbers[:rows] = arrays.ids
        numbers[room : room + rows] = arrays.positions
        numbers[2 * room : 2 * room + kept] = arrays.kept
        self._copy.send(self._numbers, 2 * room + kept)
        self._context.fill(arrays)
        return rows, kept

    def _forward(self, rows: int, kept: int) -> torch.Tensor:
        """Logits `[kept, vocab]` of the step that the buffers hold."""
        room = self._limits.rows
        ids = resolve(self._numbers[:rows], self._sampled)
        positions = self._numbers[room : room + rows]
        wanted = self._numbers[2 * room : 2 * room + kept]
        token = forward_context.set(self._context)
        try:
            return self._inputs.logits(
                self.model, ids[None], positions[None], wanted, use_cache=False
            )[0]
        finally:
            forward_context.reset(token)

    def _decode(self, size: int) -> torch.Tensor:
        """Logits `[size, vocab]` of a step of that many decoding sequences, padding included, in a
        buffer that all graphs share."""
        logits = self._forward(size, size)
        if self._logits is None:
            self._logits = logits.new_zeros(self._limits.sequences, logits.shape[1])
        return self._logits[:size].copy_(logits)

    def _capture(self, size: int) -> None:
        assert self.graphs is not None  # noqa: S101 - the callers checked it
        self.graphs.capture(size, lambda: self._decode(size))
