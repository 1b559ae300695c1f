"""Which type a model is computed in. Imported in rank processes only."""

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


def choose_dtype(wanted: str, stored: torch.dtype | None, *, on_cpu: bool) -> torch.dtype | str:
    """The dtype to load in. On a CPU `auto` is float32 unless it computes half precision natively:
    elsewhere torch's half-precision matmul is two orders of magnitude slower."""
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    instruction = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}
    if not on_cpu or stored not in instruction:
        return "auto"
    native = torch.cpu.get_capabilities().get(instruction[stored])
    return "auto" if native else torch.float32


def dtype_in(file: Path) -> torch.dtype | None:
    """The type of the first floating tensor in a safetensors file."""
    stored = (tensor.dtype for tensor in read_header(file).tensors.values())
    return next((_STORED[dtype] for dtype in stored if dtype in _STORED), None)
