"""Triton kernels and the functions that launch them, registered as operators of torch.

They run compiled on CUDA tensors, and in Triton's interpreter on CPU tensors if TRITON_INTERPRET=1
is in the environment before the first import. Nothing else imports triton.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether this process runs Triton's kernels in the interpreter, so on CPU tensors too."""
    return installed() and os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on tensors of a device."""
    return installed() and (device.type == "cuda" or interpreted())


def compiled_for(device: torch.device) -> bool:
    """Whether the kernels run on a device as machine code."""
    return device.type == "cuda" and runs_on(device)


def current_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the current one, on which Triton launches kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
