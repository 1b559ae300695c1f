"""Writes keys and values of new tokens into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.text.gpu.kernels import current_device

LARGEST_FLOAT8 = tl.constexpr(448.0)
"""Of e4m3. Larger values are clamped: the type has no infinity."""


@torch.library.custom_op("triptych::write_kv", mutates_args=("keys", "values"))
def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_scale: float,
    value_scale: float,
) -> None:
    """Write `key` `[T, H_kv, D]` and `value` `[T, H_kv, D_v]` to `slots` of the pages.

    Pages are `[pages, 32, H_kv, size]` and contiguous, `slots` int64 `[T]`: page * 32 + offset. For
    pages in float8 (e4m3) the numbers are divided by the scales.
    """
    kv_heads = key.shape[1]
    if not key.shape[0]:
        return
    with current_device(key):
        _write_kernel[(key.shape[0],)](
            *(key, value, keys, values, slots),
            *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
            *(keys.stride(1), values.stride(1)),
            *(1.0 / key_scale, 1.0 / value_scale),
            KV_HEADS=kv_heads,
            HEAD_BLOCK=triton.next_power_of_2(kv_heads),
            KEY_SIZE=key.shape[2],
            KEY_BLOCK=triton.next_power_of_2(key.shape[2]),
            VALUE_SIZE=value.shape[2],
            VALUE_BLOCK=triton.next_power_of_2(value.shape[2]),
            IS_FLOAT8=keys.element_size() == 1,
            num_warps=4,
            enable_fp_fusion=False,
        )


@triton.jit
def _copy(
    source,
    target,
    head_stride,
    factor,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
):
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < HEADS) & (column < SIZE)
    x = tl.load(source + head * head_stride + column, mask=mask, other=0.0)
    if IS_FLOAT8:
        x = x.to(tl.float32) * factor
        x = tl.minimum(tl.maximum(x, -LARGEST_FLOAT8), LARGEST_FLOAT8)
    tl.store(target + head * SIZE + column, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _write_kernel(
    key,
    value,
    keys,
    values,
    slots,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    key_token_stride,
    value_token_stride,
    key_factor,
    value_factor,
    KV_HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    _copy(
        key + row * key_row_stride,
        keys + slot * key_token_stride,
        key_head_stride,
        key_factor,
        KV_HEADS,
        HEAD_BLOCK,
        KEY_SIZE,
        KEY_BLOCK,
        IS_FLOAT8,
    )
    _copy(
        value + row * value_row_stride,
        values + slot * value_token_stride,
        value_head_stride,
        value_factor,
        KV_HEADS,
        HEAD_BLOCK,
        VALUE_SIZE,
        VALUE_BLOCK,
        IS_FLOAT8,
    )
