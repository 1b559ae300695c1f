"""The type that a model is computed in. The engines call this in rank processes only."""

from __future__ import annotations

from pathlib import Path

import torch

from runners.hf.weights import read_header

_STORED = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def choose_dtype(name: str, stored: torch.dtype | None, *, on_cpu: bool) -> torch.dtype | str:
    """The dtype to load in, for the configured `name`: a torch type or `auto`.

    On a CPU that does not compute the stored half precision natively, `auto` is float32: torch's
    half-precision matmul is two orders of magnitude slower there.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    instruction = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}
    if not on_cpu or stored not in instruction:
        return "auto"
    native = torch.cpu.get_capabilities().get(instruction[stored])
    return "auto" if native else torch.float32


def dtype_in(file: Path) -> torch.dtype | None:
    """The type of the first floating-point tensor in a safetensors file; None without one."""
    stored = (tensor.dtype for tensor in read_header(file).tensors.values())
    return next((_STORED[dtype] for dtype in stored if dtype in _STORED), None)


def widen(model: torch.nn.Module, dtype: torch.dtype | str) -> None:
    """Compute a model that was loaded as float32 in float32 throughout.

    Quantized weights that a CPU cannot use are dequantized to bfloat16, whatever dtype is asked
    for; with float32 activations no product of the two exists.
    """
    if dtype != torch.float32:
        return
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
