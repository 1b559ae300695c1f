"""What the layers of a model ask of an attention backend."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from runners.text.gpu.attention import AttentionOptions, AttentionShape, KVPages, TorchBackend
from runners.text.gpu.model_runner import GPUModelRunner
from runners.text.gpu.plan import StepPlan
from runners.text.gpu.step import StepLimits
from runners.text.paging.batch import Batch


@dataclass(frozen=True)
class _Recorder(TorchBackend):
    shapes: set[AttentionShape] = field(default_factory=set)

    @override
    def attend(
        self,
        query: torch.Tensor,
        pages: KVPages,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        shape = AttentionShape(
            heads=query.shape[1],
            kv_heads=pages.keys.shape[2],
            key_size=query.shape[2],
            value_size=pages.values.shape[3],
            dtype=query.dtype,
            kv_dtype=pages.keys.dtype,
            window=options.window,
            softcap=options.softcap,
            has_sinks=options.sinks is not None,
        )
        self.shapes.add(shape)
        super().attend(query, pages, plan, out, options)


def attention_shapes(
    model: PreTrainedModel, limits: StepLimits, kv_dtype: torch.dtype | None
) -> set[AttentionShape]:
    """The different shapes of attention among a packed model's layers, from a step of one token."""
    recorder = _Recorder()
    runner = GPUModelRunner(model, recorder, limits, blocks=1, graphs=None, kv_dtype=kv_dtype)
    runner.run(Batch([[0]], [0], [array("i", [0])], [True]))
    return recorder.shapes
