"""Copies between host and device that neither side waits for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.int64] | NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int32]

ALIGNMENT = 8
"""In bytes, of each array of a copy."""


def to_device(arrays: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays as tensors on a device, in one copy.

    On CUDA they are packed in pinned memory. Torch keeps a block of that for later copies, and
    gives it out again only once the copies from it are done, so a copy may outlast this call.
    """
    offsets, size = [], 0
    for array in arrays.values():
        offsets.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    content = packed.numpy()
    for array, offset in zip(arrays.values(), offsets, strict=True):
        content[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
    packed = packed.to(device, non_blocking=True)
    return {
        name: packed[offset : offset + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for (name, array), offset in zip(arrays.items(), offsets, strict=True)
    }


def copy_into(target: torch.Tensor, numbers: NDArray[np.int64]) -> None:
    """Copy int64 numbers to the beginning of `target`, as `to_device` does."""
    pinned = torch.empty(len(numbers), dtype=torch.int64, pin_memory=target.is_cuda)
    pinned.numpy()[:] = numbers
    target[: len(numbers)].copy_(pinned, non_blocking=True)


class HostCopy:
    """Tensors of a device on their way to the host."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._tensors = {name: _start_copy(tensor) for name, tensor in tensors.items()}
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.cuda.current_stream(device).record_event()

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors on the host, once the device has computed them."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
