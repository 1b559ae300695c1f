"""The Triton kernel of `cutoff`: a search over the float32 numbers in their order as integers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.text.gpu.kernels import current_device

BLOCK = 4096
"""Logits that are read at once."""


@torch.library.custom_op("triptych::cutoff", mutates_args=())
def launch(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """See `cutoff`."""
    thresholds = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        log_min_p = min_p.log()
        with current_device(logits):
            _cutoff_kernel[(logits.shape[0],)](
                logits,
                logits.stride(0),
                logits.shape[1],
                top_k,
                top_p,
                log_min_p,
                thresholds,
                BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
                num_warps=8,
                enable_fp_fusion=False,
            )
    return thresholds


@launch.register_fake
def _(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    return logits.new_empty(logits.shape[0])


@triton.jit
def _ordered(x):
    """Float32 as int64 from 0 to 2**32 - 1 in the same order, with one zero."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _float(key):
    """The inverse of `_ordered`."""
    bits = tl.where(key < 2147483648, -1 - key, key - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _mass_above(row, vocab, key, step, lowest, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """What the logits from `lowest` on that are at least `key + i * step` weigh, for i = 1, 2, 3.

    A weight is 1 if COUNT, else `exp(x - largest)`. Each is summed in the same order in any batch.
    """
    first = tl.zeros([BLOCK], dtype=tl.float64)
    second = tl.zeros([BLOCK], dtype=tl.float64)
    third = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < vocab, other=float("-inf"))
        keys = _ordered(x)
        inside = (columns < vocab) & (keys >= lowest)
        if COUNT:
            weight = tl.where(inside, 1.0, 0.0).to(tl.float64)
        else:
            below = x < largest
            # Not `x - largest` of all: of two infinities it is NaN.
            weight = tl.exp(tl.where(below, x, 0.0) - tl.where(below, largest, 0.0))
            weight = tl.where(inside, weight, 0.0).to(tl.float64)
        first += tl.where(keys >= key + step, weight, 0.0)
        second += tl.where(keys >= key + 2 * step, weight, 0.0)
        third += tl.where(keys >= key + 3 * step, weight, 0.0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0), tl.sum(third, axis=0)


@triton.jit
def _search(row, vocab, target, lowest, largest, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key such that the logits from it on weigh at least `target`.

    It is found two bits at a time: of three keys in a row, the weight falls from each to the next.
    """
    key = tl.zeros([], dtype=tl.int64)
    step = tl.full([], 1 << 30, dtype=tl.int64)
    for _ in range(16):
        first, second, third = _mass_above(row, vocab, key, step, lowest, largest, COUNT, BLOCK)
        reached = (first >= target).to(tl.int64) + (second >= target).to(tl.int64)
        key += (reached + (third >= target).to(tl.int64)) * step
        step = step // 4
    return key


@triton.jit
def _cutoff_kernel(logits, stride, vocab, top_k, top_p, log_min_p, thresholds, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    k = tl.load(top_k + index)
    p = tl.load(top_p + index)
    maxima = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < vocab, other=float("-inf"))
        maxima = tl.maximum(maxima, x)
    largest = tl.max(maxima, axis=0)
    threshold = tl.full([], float("-inf"), dtype=tl.float32)
    lowest = tl.zeros([], dtype=tl.int64)
    if (k > 0) & (k < vocab):
        lowest = _search(row, vocab, k.to(tl.float64), lowest, largest, True, BLOCK)
        threshold = _float(lowest)
    if p < 1.0:
        zero = tl.zeros([], dtype=tl.int64)
        # All of the mass is at or above the third of three keys that are all 0.
        _, _, total = _mass_above(row, vocab, zero, zero, lowest, largest, False, BLOCK)
        # At 0 the target is reached by every key, the one of infinity included.
        target = tl.maximum(p.to(tl.float64) * total, 1e-300)
        threshold = _float(_search(row, vocab, target, lowest, largest, False, BLOCK))
    threshold = tl.maximum(threshold, largest + tl.load(log_min_p + index))
    tl.store(thresholds + index, tl.minimum(threshold, largest))
