"""What the layers of a model ask of an attention backend."""

from __future__ import annotations

from array import array

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from runners.text.gpu.attention import AttentionCall, AttentionOptions, StepPlan, TorchBackend
from runners.text.gpu.model_runner import GPUModelRunner, StepLimits
from runners.text.paging.batch import Batch


class _Recorder(TorchBackend):
    def __init__(self) -> None:
        super().__init__()
        self.calls: set[AttentionCall] = set()

    @override
    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        self.calls.add(AttentionCall.of(query, keys, values, options))
        super().attend(query, keys, values, plan, out, options)


def attention_calls(model: PreTrainedModel, limits: StepLimits) -> set[AttentionCall]:
    """The different attention calls of a packed model's layers, from one step of one token."""
    recorder = _Recorder()
    runner = GPUModelRunner(model, recorder, limits, blocks=1, graphs=None)
    runner.run(Batch([[0]], [0], [array("i", [0])], [True]))
    return recorder.calls
