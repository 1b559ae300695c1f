"""The types of a model's weights and of its arithmetic. The engines call this in rank processes.

A CPU computes in float32: torch's products of 16-bit matrices are up to two orders of magnitude
slower. There, float16 and bfloat16 are types of stored weights: the values are rounded to them,
and cast to float32 when they are used.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from runners.hf.weights import read_header

logger = logging.getLogger("triptych.hf")

HALF = (torch.float16, torch.bfloat16)

_STORED = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def choose_dtype(name: str, folder: Path, *, on_cpu: bool) -> torch.dtype | str:
    """The dtype to load a model of transformers in: a torch type or `auto`.

    On a CPU, float32 is the stored type if all weights have one 16-bit type: the values are the
    same, and stay mapped from their files.
    """
    if name == "auto":
        return name
    dtype: torch.dtype = getattr(torch, name)
    if on_cpu and dtype == torch.float32:
        files = folder.glob("*.safetensors")
        stored = {t.dtype for file in files for t in read_header(file).tensors.values()}
        types = {_STORED[each] for each in stored if each in _STORED}
        if len(types) == 1 and types <= set(HALF):
            return types.pop()
    return dtype


def dtype_in(file: Path) -> torch.dtype | None:
    """The type of the first floating-point tensor in a safetensors file; None without one."""
    stored = (tensor.dtype for tensor in read_header(file).tensors.values())
    return next((_STORED[dtype] for dtype in stored if dtype in _STORED), None)


@dataclass
class _Stored:
    """How the weights of a model that computes in float32 were loaded."""

    dtype: torch.dtype
    handles: dict[nn.Module, list[RemovableHandle]] = field(default_factory=dict)
    """The hooks of the layers that are cast while they compute."""


_stored: WeakKeyDictionary[nn.Module, _Stored] = WeakKeyDictionary()


def weight_dtype(model: Any) -> torch.dtype:
    """The type that the values of a model's weights have."""
    stored = _stored.get(model)
    dtype: torch.dtype = model.dtype if stored is None else stored.dtype
    return dtype


def computes_in_float32(model: nn.Module) -> bool:
    """Whether `compute_in_float32` or `cast_to_float32` was called for a model."""
    return model in _stored


def compute_in_float32(model: PreTrainedModel) -> None:
    """Let a model on the CPU compute in float32, while its layers keep 16-bit weights.

    A layer, and the output projection, has float32 weights only while it computes; everything else
    is cast. Call it again once layers have been replaced. Weights that are on disk are cast when
    they are read.
    """
    stored = _stored.setdefault(model, _Stored(model.dtype))
    if any(parameter.is_meta for parameter in model.parameters()):
        cast_to_float32(model)
        return
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    layers = [*_layers(model), *([] if head is None else [head])]
    for layer in layers:
        if layer not in stored.handles:
            stored.handles[layer] = _cast_while_computing(layer)
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            _cast(module.parameters(recurse=False))
    _cast(model.buffers())


def cast_to_float32(model: nn.Module) -> None:
    """Cast all 16-bit weights and buffers of a model to float32, one after another."""
    _stored.setdefault(model, _Stored(weight_dtype(model)))
    remove_hooks(model)
    _cast(model.parameters())
    _cast(model.buffers())


def remove_hooks(model: nn.Module) -> None:
    """Stop casting layers while they compute: their 16-bit weights are about to be replaced."""
    handles = _stored[model].handles
    for handle in itertools.chain.from_iterable(handles.values()):
        handle.remove()
    handles.clear()


def log_dtypes(name: str, *models: nn.Module) -> None:
    """Log that models with 16-bit weights compute in float32, and what this costs in memory."""
    halves = [model for model in models if computes_in_float32(model)]
    types = sorted({str(weight_dtype(m)) for m in halves if weight_dtype(m) in HALF})
    if not types:
        return
    parameters = {p.data_ptr(): p for model in halves for p in model.parameters()}.values()
    wide = sum(p.nbytes for p in parameters if p.dtype == torch.float32)
    logger.info(
        "%s: on this CPU the weights are %s and the arithmetic is float32; %.0f MiB of the weights "
        "are kept in float32",
        name,
        " and ".join(types).replace("torch.", ""),
        wide / 2**20,
    )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of lists of modules, which a model calls one after another."""
    listed = isinstance(module, nn.ModuleList | nn.ModuleDict)
    for child in module.children():
        if listed and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield child
        else:
            yield from _layers(child)


def _cast_while_computing(layer: nn.Module) -> list[RemovableHandle]:
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    def widen(module: nn.Module, *_: Any) -> None:
        with torch.inference_mode(False):
            for parameter in module.parameters():
                if parameter.dtype in HALF:
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        while kept:
            parameter, data = kept.pop()
            parameter.data = data

    return [
        layer.register_forward_pre_hook(widen, prepend=True),
        layer.register_forward_hook(restore, always_call=True),
    ]


def _cast(tensors: Iterator[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
