"""The memory that images need on GPUs, and how many of them fit at a time.

Called by the image program at its start, in rank processes.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

logger = logging.getLogger("triptych.images")


class GpuMemory(NamedTuple):
    """The memory of one GPU, in bytes."""

    total: int
    free: int
    """What this process can still allocate, its allocator's unused cache included."""
    allocated: int
    """The tensors of this process."""
    peak: int
    """The most of `allocated` since `reset_peaks`."""


def reset_peaks() -> None:
    """Begin a new measurement of each GPU's peak."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def gpu_memories() -> list[GpuMemory]:
    """The memory of each GPU; empty without any."""
    return [_gpu_memory(index) for index in range(torch.cuda.device_count())]


def pixels_at_once(
    before: list[GpuMemory], after: list[GpuMemory], *, pixels: int, share: float
) -> int | None:
    """The pixels, height times width, of all images that can be generated together.

    From what one image of `pixels` allocated for a time, between `before` and `after`, as a
    proportional estimate. `share`: the part of a GPU that this process may use, from 0 to 1. None
    if no image was generated on a GPU.
    """
    bounds = []
    for earlier, later in zip(before, after, strict=True):
        needed = later.peak - earlier.allocated
        if needed > 0:
            room = min(later.free, int(share * later.total) - later.allocated)
            bounds.append(max(0, room) * pixels // needed)
    return min(bounds, default=None)


def warn_if_too_large(max_pixels: int, bound: int) -> None:
    """Warn if not even one image of the maximum size fits."""
    if bound < max_pixels:
        logger.warning(
            "max_pixels: the GPU's free memory is enough for images of about %d pixels, "
            "and max_pixels is %d",
            bound,
            max_pixels,
        )


def _gpu_memory(index: int) -> GpuMemory:
    free, total = torch.cuda.mem_get_info(index)
    allocated = torch.cuda.memory_allocated(index)
    cached = torch.cuda.memory_reserved(index) - allocated
    return GpuMemory(total, free + cached, allocated, torch.cuda.max_memory_allocated(index))
