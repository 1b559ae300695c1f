"""GPUModelRunner: one packed step of a stock Hugging Face causal LM on GPUs.

All rows of a step run in one forward, with one attention call per layer over the pages of the KV
cache. Steps are padded to one of a few shapes and replayed as graphs. With
`attention_kernel` set to `torch` or `triton` the same path runs on a CPU, with the same buffers and
recorded graphs: that is how it is tested where there is no GPU.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from typing_extensions import override

from runners.text.engine import ModelRunner
from runners.text.gpu.attention import Backend
from runners.text.gpu.graphs import Graph, GraphCache, replay, row_sizes, sequence_sizes
from runners.text.gpu.kv import PagePool
from runners.text.gpu.step import StepContext, StepLimits, StepShape, arrays_of
from runners.text.gpu.transfer import copy_into
from runners.text.model_runner import ForwardInputs, input_device, resolve
from runners.text.paging.batch import Batch, forward_context
from runners.text.paging.blocks import BLOCK_SIZE

CHUNKS_SHARE = 0.5
"""Of the graphs' memory, how much may be taken before steps with prompt chunks are not captured any
more: decoding steps gain more."""


@dataclass(frozen=True)
class GraphOptions:
    """Whether decode steps run as graphs."""

    max_bytes: int
    """Memory of all graphs."""
    agree: Callable[[bool], bool] = lambda success: success
    """Has all ranks that hold the model decide alike."""


class GPUModelRunner(ModelRunner):
    """A model and its KV cache of `blocks` blocks; `graphs` is None to run every step eagerly,
    `kv_dtype` is None for that of the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        backend: Backend,
        limits: StepLimits,
        *,
        blocks: int,
        graphs: GraphOptions | None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model: PreTrainedModel = model.train(False)
        self.device = input_device(model)
        self.vocab_size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        self._limits = limits
        self._inputs = ForwardInputs.of(model)
        self._context = StepContext(PagePool(blocks, kv_dtype), backend, limits)
        numbers = 2 * limits.rows + limits.sequences
        self._numbers = torch.zeros(numbers, dtype=torch.int64, device=self.device)
        self._sampled = torch.zeros(limits.sequences, dtype=torch.int64, device=self.device)
        self._logits: torch.Tensor | None = None
        self.graphs: GraphCache[StepShape] | None = None
        if graphs is not None:
            self.graphs = GraphCache(self.device, max_bytes=graphs.max_bytes, agree=graphs.agree)
        self._sequence_sizes = sequence_sizes(limits.sequences)
        self._row_sizes = row_sizes(limits.rows)

    @override
    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        if self.graphs is None:
            rows, wanted = sum(map(len, batch.tokens)), sum(batch.wanted)
            shape = StepShape(rows, len(batch.tokens), wanted, has_chunks=False)
            self._fill(batch, shape)
            return self._forward(shape)
        shape = self._padded_shape(batch)
        if self.graphs.is_due(shape, share=CHUNKS_SHARE if shape.has_chunks else 1.0):
            self._capture(shape)
        self._fill(batch, shape)
        if (graph := self.graphs.get(shape)) is None:
            logits = self._compute(shape)
        elif self.graphs.is_verified(shape):
            logits = replay(graph)
        else:
            logits = self._first_replay(shape, graph)
        return logits[: sum(batch.wanted)]

    @override
    def feed(self, tokens: torch.Tensor) -> None:
        self._sampled[: len(tokens)].copy_(tokens, non_blocking=True)

    @override
    @torch.inference_mode()
    def idle(self) -> None:
        """Captures the next graph, so that a later step need not: the largest first, whose memory
        the others share."""
        if self.graphs is None or self.graphs.stopped:
            return
        shapes = map(self._decode_shape, [1, *reversed(self._sequence_sizes)])
        missing = (shape for shape in shapes if self.graphs.get(shape) is None)
        if (shape := next(missing, None)) is not None:
            self._capture(shape)

    @override
    def shrink(self) -> int | None:
        if (pool := self._context.pool.smaller()) is None:
            return None
        self._context.pool = pool
        if self.graphs is not None:
            self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return pool.blocks

    def bytes_per_token(self) -> dict[torch.device, int]:
        """Bytes of KV per token on each device, once a batch has run."""
        sizes = self._context.pool.bytes_per_block().items()
        return {device: -(-size // BLOCK_SIZE) for device, size in sizes}

    def _decode_shape(self, size: int) -> StepShape:
        return StepShape(size, size, size, has_chunks=False)

    def _padded_shape(self, batch: Batch) -> StepShape:
        """The smallest shape with a graph that holds a batch."""
        rows, sequences = sum(map(len, batch.tokens)), len(batch.tokens)
        if rows == sequences and all(batch.wanted):
            return self._decode_shape(_at_least(rows, self._sequence_sizes))
        most = self._limits.sequences
        return StepShape(_at_least(rows, self._row_sizes), most, most, has_chunks=True)

    def _fill(self, batch: Batch, shape: StepShape) -> None:
        """Begin to copy a batch to the devices."""
        arrays = arrays_of(batch, shape)
        room = self._limits.rows
        numbers = np.zeros(2 * room + shape.kept, dtype=np.int64)
        numbers[: shape.rows] = arrays.ids
        numbers[room : room + shape.rows] = arrays.positions
        numbers[2 * room :] = arrays.kept
        copy_into(self._numbers, numbers)
        self._context.fill(arrays)

    def _forward(self, shape: StepShape) -> torch.Tensor:
        """Logits `[kept, vocab]` of the step that the buffers hold."""
        room = self._limits.rows
        ids = resolve(self._numbers[: shape.rows], self._sampled)
        positions = self._numbers[room : room + shape.rows]
        kept = self._numbers[2 * room : 2 * room + shape.kept]
        token = forward_context.set(self._context)
        try:
            return self._inputs.logits(
                self.model, ids[None], positions[None], kept, use_cache=False
            )[0]
        finally:
            forward_context.reset(token)

    def _compute(self, shape: StepShape) -> torch.Tensor:
        """As `_forward`, in a buffer that all graphs share."""
        logits = self._forward(shape)
        if self._logits is None:
            self._logits = logits.new_zeros(self._limits.sequences, logits.shape[1])
        return self._logits[: shape.kept].copy_(logits)

    def _capture(self, shape: StepShape) -> None:
        """Capture a step of padding, whose KV nothing reads."""
        assert self.graphs is not None  # noqa: S101 - the callers checked it
        self._fill(Batch([], [], [], []), shape)
        self.graphs.capture(shape, lambda: self._compute(shape))

    def _first_replay(self, shape: StepShape, graph: Graph) -> torch.Tensor:
        """The logits of a step whose graph is new, and must give the same as the step without."""
        assert self.graphs is not None  # noqa: S101 - the caller checked it
        # First the replay, into a buffer without results: what the other writes is not there yet.
        graph.output.fill_(float("nan"))
        replayed = replay(graph).nan_to_num()
        expected = self._compute(shape)
        self.graphs.verify(shape, torch.equal(replayed, expected.nan_to_num()))
        return expected


def _at_least(count: int, sizes: list[int]) -> int:
    return sizes[bisect.bisect_left(sizes, count)]
