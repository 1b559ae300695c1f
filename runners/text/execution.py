"""How the steps of a model run: on the CPU path, or on the GPU path, which samples on the device.

`loading` chooses once per rank. The GPU path also runs on a CPU when `attention_kernel` names one
of its kernels: that is how it is tested where there is no GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from runners.config.base import TextConfig
from runners.contracts.errors import ConfigError
from runners.text.engine import ModelRunner
from runners.text.gpu.attention import AttentionShape, Backend, TorchBackend
from runners.text.gpu.model_runner import GPUModelRunner, GraphOptions
from runners.text.gpu.proof import choose_backend
from runners.text.gpu.sampling import DeviceSampler
from runners.text.gpu.step import StepLimits
from runners.text.lockstep import TPGroup
from runners.text.model_runner import HFModelRunner, Layout, input_device
from runners.text.samplers import HostSampler, SampledStep, Sampler
from runners.text.sampling import SamplerState

logger = logging.getLogger("triptych.text")


CHECKED_ROWS, CHECKED_SEQUENCES = 64, 2
"""What the steps of a parity check need, whatever is configured."""


class SizedRunner(ModelRunner, Protocol):
    """A model runner that knows the size of what it computes with."""

    vocab_size: int

    def bytes_per_token(self) -> dict[torch.device, int]:
        """Bytes of KV per token on each device, once a batch has run."""
        ...


class Execution(Protocol):
    """Creates what runs the steps of a model."""

    overlap: bool
    """Whether a step is submitted before the tokens of the last one are known."""

    def runner(
        self, model: PreTrainedModel, layout: Layout, *, blocks: int, graphs: bool = False
    ) -> SizedRunner:
        """A runner with a KV cache of `blocks` blocks."""
        ...

    def sampler(self) -> Sampler:
        """What samples from the logits of a model."""
        ...


class HostExecution(Execution):
    """Steps whose logits come to the CPU, where they are sampled."""

    overlap = False

    @override
    def runner(
        self, model: PreTrainedModel, layout: Layout, *, blocks: int, graphs: bool = False
    ) -> SizedRunner:
        return HFModelRunner(model, layout, blocks=blocks)

    @override
    def sampler(self) -> Sampler:
        return HostSampler()


@dataclass(frozen=True)
class GPUExecution(Execution):
    """Steps that return nothing but token ids to the host."""

    backend: Backend
    limits: StepLimits
    graphs: GraphOptions | None
    overlap: bool
    kv_dtype: torch.dtype | None = None
    """None: that of the model."""

    @override
    def runner(
        self, model: PreTrainedModel, layout: Layout, *, blocks: int, graphs: bool = False
    ) -> SizedRunner:
        if layout == "padded":
            return HFModelRunner(model, layout, blocks=blocks)
        options = self.graphs if graphs else None
        return GPUModelRunner(
            model,
            self.backend,
            self.limits,
            blocks=blocks,
            graphs=options,
            kv_dtype=self.kv_dtype,
        )

    @override
    def sampler(self) -> Sampler:
        return LogitsSampler()

    def with_backend(
        self, shapes: Collection[AttentionShape], device: torch.device, requested: str
    ) -> GPUExecution:
        """With the backend that is proved equal for all shapes and is the fastest.

        Raises: ConfigError if `requested` cannot be used.
        """
        backend = choose_backend(shapes, device, requested)
        if self.graphs is not None and device.type == "cuda" and not backend.capturable:
            logger.warning("steps run eagerly: %s attention cannot be captured", backend.name)
            return replace(self, backend=backend, graphs=None)
        return replace(self, backend=backend)


class LogitsSampler(Sampler):
    """Samples where the logits are, whose width is known once there are any."""

    def __init__(self) -> None:
        self._sampler: DeviceSampler | None = None

    @override
    def launch(
        self, logits: torch.Tensor, states: Sequence[SamplerState], indices: Sequence[int]
    ) -> SampledStep:
        if self._sampler is None:
            self._sampler = DeviceSampler(logits.device, logits.shape[1])
        return self._sampler.launch(logits, states, indices)


def choose_execution(
    model: PreTrainedModel, config: TextConfig, *, max_context: int, group: TPGroup | None = None
) -> HostExecution | GPUExecution:
    """The path for a model on its devices. Raises: ConfigError for a kernel of the other device."""
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs are captured on the current one
    kernel = config.attention_kernel
    on_gpu = any(parameter.device.type == "cuda" for parameter in model.parameters())
    if on_gpu and kernel == "cpu":
        raise ConfigError("cpu is for models on a CPU", field="attention_kernel")
    if not on_gpu and kernel == "varlen":
        raise ConfigError("varlen is for models on a GPU", field="attention_kernel")
    if not on_gpu and kernel in ("auto", "cpu"):
        if config.kv_cache_dtype != "auto":
            raise ConfigError("is for models on a GPU", field="kv_cache_dtype")
        return HostExecution()
    reason = _not_capturable(model) if config.cuda_graphs else "cuda_graphs is off"
    if group is not None and device.type == "cpu":
        reason = "a recorded graph has no collectives"
    if reason:
        logger.info("%s: decode steps run eagerly: %s", config.name, reason)
    limits = StepLimits(
        rows=max(config.max_step_tokens, config.max_batch_size, CHECKED_ROWS) + 1,
        sequences=max(config.max_batch_size, CHECKED_SEQUENCES),
        context=max_context,
    )
    graphs = None if reason else GraphOptions(config.graph_memory << 20)
    if graphs is not None and group is not None:
        graphs = replace(graphs, agree=lambda success: bool(group.all_reduce_min(success)))
    return GPUExecution(TorchBackend(), limits, graphs, config.overlap)


def _not_capturable(model: PreTrainedModel) -> str:
    """Why the steps of a model cannot be captured as graphs, as far as its placement tells."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "parts of the model are moved between devices while it computes"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is on several devices"
    return ""
