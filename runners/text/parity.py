"""Parity checks: which layout a model may be batched in, and which of its parts run on CPU kernels.

At its start, every model's logits from chunked, mixed steps over short prompts are compared with
those of its plain forward. A model without a layout that gives the same logits is refused; kernels
that change them are removed. `loading` and the engines call this in all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from runners.config.base import AttentionKernel, TextConfig
from runners.contracts.errors import ConfigError, first_line, reraise_as
from runners.hf.dtypes import cast_to_float32, computes_in_float32
from runners.hf.models import DEVICE_ERRORS
from runners.text.attention import PACKED
from runners.text.cpu import Kernels, load_kernels, switch_off_kernels
from runners.text.cpu.decoder import fuse_decoder, unfuse_decoder
from runners.text.cpu.fusing import fuse_modules, unfuse_modules
from runners.text.cpu.linear import Quantization, pack_linears, unpack_linears
from runners.text.engine import PagedEngine
from runners.text.execution import Execution, GPUExecution, HostExecution
from runners.text.gpu.attention import FLOAT8
from runners.text.gpu.fusing import fuse_rows, unfuse_rows
from runners.text.gpu.invariance import install_invariant_operators
from runners.text.gpu.kernels import compiled_for
from runners.text.gpu.probe import attention_shapes
from runners.text.lockstep import TPGroup, is_rank_loss
from runners.text.model_runner import Layout, input_device
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.samplers import HostSampler

logger = logging.getLogger("triptych.text")

KV_TOKENS = 256

FAILURE_TIMEOUT_S = 60
"""Seconds that a rank whose forward failed waits for the other ranks to take part."""

EXACT, HALF_PRECISION, QUANTIZED = 1e-3, 0.1, 0.5
"""Largest difference of a logit, in standard deviations of the reference. In half precision the
last bits depend on the shape of a batch, quantized weights are rounded; wrong arithmetic differs by
more."""

WINDOW_ATTRIBUTES = ("sliding_window", "attention_chunk_size", "floor_scale")
"""Lengths from which on a token is computed otherwise, in configurations and modules."""
NARROW_WINDOW = 4


class ParityCheck:
    """The logits of a model as it was loaded, to compare with those of batched steps.

    With `group`, all its ranks get the same results, and a model may be split among them between
    the reference and a check.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        group: TPGroup | None = None,
        execution: Execution | None = None,
    ) -> None:
        self._model = model
        self._execution = execution or HostExecution()
        self._default_attention = model.config._attn_implementation
        self._group = group
        self._failure = ""
        """Why the last check failed."""
        exact = computes_in_float32(model) or model.dtype in (torch.float32, torch.float64)
        self._tolerance = EXACT if exact else HALF_PRECISION
        if group is None or group.is_leader:
            # Windows wider than the prompts would not be checked at all.
            name = type(model).__name__
            failed = reraise_as(ConfigError, f"{name}: its forward fails", passing=DEVICE_ERRORS)
            with _narrow_windows(model), failed:
                self._reference = _reference_logits(model)
            if self._reference.isnan().any():
                raise ConfigError(f"{name} gives logits that are NaN: its weights may be damaged")
        else:
            self._reference = torch.empty(len(_prompts(model)), _vocab_size(model))
        if group is not None:
            self._reference = group.broadcast(self._reference)

    def for_model(self, model: PreTrainedModel, execution: Execution | None = None) -> ParityCheck:
        """The check of another copy of the model, or on another path, against the same
        reference."""
        check = copy(self)
        check._model = model
        check._execution = execution or self._execution
        return check

    def choose_layout(self) -> Layout:
        """The layout that matches; sets the model's attention accordingly. Raises: ConfigError."""
        layout = self.find_layout()
        if layout is None:
            raise ConfigError(
                f"{type(self._model).__name__} cannot be batched continuously: {self._failure}"
            )
        return layout

    def find_layout(self) -> Layout | None:
        """As `choose_layout`, but None if no layout matches.

        Raises: ConfigError if the ranks cannot agree on that.
        """
        model = self._model
        if getattr(model, "_supports_attention_backend", False):
            model.set_attn_implementation(PACKED)
            if self.matches("packed"):
                return "packed"
            model.set_attn_implementation(self._default_attention)
        return "padded" if self.matches("padded") else None

    def matches(self, layout: Layout, *, tolerance: float | None = None) -> bool:
        """Whether the model, as it is now, gives the reference logits in this layout."""
        try:
            with _narrow_windows(self._model):
                logits = _batched_logits(self._model, layout, self._execution)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # an architecture may fail in any way in a layout it cannot use
            if is_rank_loss(error):
                raise
            cause = f"{type(error).__name__}: {first_line(error)}"
            logger.info("%s in the %s layout: %s", type(self._model).__name__, layout, cause)
            self._failure = f"its forward with a KV cache fails with {cause}"
            return self.all_ranks(False, error)
        spread = max(float(self._reference.std()), 1e-3)
        limit = (tolerance or self._tolerance) * spread
        self._failure = "its logits with a KV cache differ from those of its plain forward"
        difference = (logits - self._reference).abs().max()
        return self.all_ranks(bool(torch.isfinite(logits).all() and difference <= limit))

    def backend_of_leader(self, execution: GPUExecution) -> str:
        """The name of the attention backend that rank 0 chose; its timings decide for all."""
        names = get_args(AttentionKernel)
        index = torch.tensor(names.index(execution.backend.name))
        if self._group is not None:
            self._group.broadcast(index)
        return str(names[int(index)])

    def all_ranks(self, success: bool, error: Exception | None = None) -> bool:
        """Whether all ranks have success; `error` is the failure of this one.

        Raises: ConfigError if the other ranks had no failure, and do not take part.
        """
        if self._group is None:
            return success
        timeout_s = FAILURE_TIMEOUT_S if error else None
        try:
            return bool(self._group.all_reduce_min(success, timeout_s=timeout_s))
        except TimeoutError:
            raise ConfigError(
                f"{type(self._model).__name__} cannot be split: it fails on one rank only: {error}"
            ) from error


def check_and_pack(
    model: PreTrainedModel, quantization: Quantization | None, parity: ParityCheck | None = None
) -> Layout:
    """The layout of a model, which gets packed weights and fused kernels where these match.

    `parity` is the check of the model as it was loaded; by default, as it is now.
    Raises: ConfigError if no layout matches, or the quantization is impossible here.
    """
    parity = parity or ParityCheck(model)
    layout = parity.choose_layout()
    kernels = load_kernels()
    if not parity.all_ranks(kernels is not None) and kernels is not None:
        switch_off_kernels()  # another rank has none
        kernels = None
    if kernels is None:
        if quantization is not None:
            raise ConfigError(
                "weight_quantization needs the CPU kernels, which are switched off or could not be "
                "compiled (the log says why); they need a C++ compiler such as g++"
            )
        if computes_in_float32(model):
            cast_to_float32(model)
        return layout
    if not pack_linears(model, kernels, quantization):
        if quantization is not None:
            raise ConfigError(
                "weight_quantization is for linear layers on a CPU; this model has none there"
            )
        return layout
    tolerance = None if quantization is None else QUANTIZED
    matches = _fuse(model, kernels, layout, parity, tolerance)
    if not matches:
        if quantization is not None:
            raise ConfigError(
                f"{type(model).__name__} does not tolerate weight_quantization {quantization}: "
                "its logits change too much"
            )
        logger.warning("%s runs without CPU kernels: its logits differ", type(model).__name__)
    unpack_linears(model, only_read=matches)
    return layout


def choose_gpu_kernels(
    model: PreTrainedModel,
    execution: GPUExecution,
    config: TextConfig,
    parity: ParityCheck | None = None,
) -> tuple[Layout, GPUExecution]:
    """The layout of a model on the GPU path, and the path with its attention backend.

    `parity` as in `check_and_pack`. Raises: ConfigError if no layout matches, or not with what the
    config asks for.
    """
    parity = (parity or ParityCheck(model)).for_model(model, execution)
    has_kernels = compiled_for(input_device(model))
    if has_kernels and config.batch_invariant:
        install_invariant_operators("cuda")
    if computes_in_float32(model):
        cast_to_float32(model)
    name, kernel = type(model).__name__, config.attention_kernel
    kv_dtype = FLOAT8 if config.kv_cache_dtype == "fp8" else None
    layout = parity.choose_layout()
    if layout == "padded":
        if kernel != "auto":
            logger.warning("%s has its own attention: attention_kernel %s is ignored", name, kernel)
        if kv_dtype is not None:
            raise ConfigError(f"{name} has its own attention, without fp8", field="kv_cache_dtype")
        return layout, execution
    # A step of the model, which all ranks run: what follows must not depend on another.
    shapes = attention_shapes(model, execution.limits, kv_dtype)
    execution, device = replace(execution, kv_dtype=kv_dtype), input_device(model)
    best = execution.with_backend(shapes, device, kernel)
    if (chosen := parity.backend_of_leader(best)) != best.backend.name:
        best = execution.with_backend(shapes, device, chosen)
    tolerance = None if kv_dtype is None else QUANTIZED
    check = parity.for_model(model, best)
    if has_kernels:
        fuse_rows(model)
        if check.matches(layout, tolerance=tolerance):
            return layout, best
        unfuse_rows(model)
    if check.matches(layout, tolerance=tolerance):
        return layout, best
    if kv_dtype is not None:
        raise ConfigError(f"{name}: its logits change too much", field="kv_cache_dtype")
    if kernel != "auto":
        raise ConfigError(f"{name}: its logits differ with {kernel}", field="attention_kernel")
    logger.warning("%s runs with torch's attention: its logits differ with a kernel", name)
    return layout, execution


def _fuse(
    model: PreTrainedModel,
    kernels: Kernels,
    layout: Layout,
    parity: ParityCheck,
    tolerance: float | None,
) -> bool:
    """Fuse as many modules of a packed model as match; whether even the packed model matches."""
    fuse_modules(model, kernels)
    if layout == "packed":
        fuse_decoder(model, kernels)
    for undo in (unfuse_decoder, unfuse_modules):
        if parity.matches(layout, tolerance=tolerance):
            return True
        undo(model)
    return parity.matches(layout, tolerance=tolerance)


def _vocab_size(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def _prompts(model: PreTrainedModel) -> list[list[int]]:
    """Two prompts; the first extends into a second KV block."""
    vocab_size = _vocab_size(model)
    return [
        [(7 * i + 3 + k) % vocab_size for i in range(n)] for k, n in enumerate((BLOCK_SIZE + 9, 9))
    ]


@torch.inference_mode()
def _reference_logits(model: PreTrainedModel) -> torch.Tensor:
    """Last-token logits `[2, vocab]` of the prompts by the model's plain forward, uncached."""
    model.train(False)
    device = input_device(model)
    return torch.cat(
        [
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            .logits[:, -1]
            .float()
            .cpu()
            for ids in _prompts(model)
        ]
    )


def _batched_logits(model: PreTrainedModel, layout: Layout, execution: Execution) -> torch.Tensor:
    """Last-token logits `[2, vocab]` of the prompts from chunked, mixed steps."""
    blocks = KV_TOKENS // BLOCK_SIZE
    runner = execution.runner(model, layout, blocks=blocks)
    engine = PagedEngine(runner, HostSampler(), blocks=blocks)
    first, second = _prompts(model)
    for uid, ids in ((1, first), (2, second)):
        engine.open(uid, ids)
        engine.extend(uid, len(ids))
    engine.put([1], [first[:4]])
    engine.put([1, 2], [first[4:-1], second[:-1]])
    return engine.put([1, 2], [first[-1:], second[-1:]])


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Narrow all windows, chunks and scales of attention, so that short prompts extend beyond them.

    Architectures that pass the window to the attention function keep it in their modules; those
    that only mask read it from the configuration.
    """
    owners: list[Any] = [model.config, model.config.get_text_config(), *model.modules()]
    changed: list[tuple[Any, str, int]] = []
    rope = getattr(owners[1], "rope_parameters", None) or {}
    original = dict(rope)
    try:
        for owner in owners:
            for name in WINDOW_ATTRIBUTES:
                width = getattr(owner, name, None)
                if isinstance(width, int) and not isinstance(width, bool) and width > NARROW_WINDOW:
                    changed.append((owner, name, width))
                    setattr(owner, name, NARROW_WINDOW)
        if "llama_4_scaling_beta" in rope:  # whose modules read it here in every forward
            rope["original_max_position_embeddings"] = NARROW_WINDOW
        yield
    finally:
        rope |= original
        for owner, name, width in reversed(changed):
            setattr(owner, name, width)
