"""Matrix products of batches and of groups of rows, whose bits per row depend on nothing else.

There is one tile for all sizes, and the inner dimension is summed in order. `grouped` serves
mixtures of experts: which rows an expert has is read on the device, so a graph may record it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.text.gpu import kernels

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 64


def batched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for a `[B, M, K]` and b `[B, K, N]` with any strides, summed in float32."""
    result: torch.Tensor = _batched(a, b, *_blocks())
    return result


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each row of x `[S, K]` times the matrix of its group, weight `[G, K, N]`: `[S, N]`.

    Group g has the rows from `ends[g - 1]` to `ends[g]` (int32 `[G]`). Rows after the last group
    are 0.
    """
    result: torch.Tensor = _grouped(x, weight, ends, *_blocks())
    return result


def _blocks() -> tuple[int, int]:
    # The interpreter multiplies with NumPy, where a row's bits do not depend on its place in a
    # product of up to 8 rows.
    return (8, 32) if kernels.interpreted() else (BLOCK_M, BLOCK_N)


@torch.library.custom_op("triptych::batched_matmul", mutates_args=())
def _batched(a: torch.Tensor, b: torch.Tensor, block_m: int, block_n: int) -> torch.Tensor:
    batch, rows, inputs = a.shape
    outputs = b.shape[2]
    out = torch.empty(batch, rows, outputs, dtype=a.dtype, device=a.device)
    if not out.numel():
        return out
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
    with kernels.current_device(a):
        _batched_kernel[(tiles, batch)](
            *(a, b, out, rows, outputs, inputs, *a.stride(), *b.stride()),
            **_options(a.dtype, block_m, block_n),
        )
    return out


@_batched.register_fake
def _(a: torch.Tensor, b: torch.Tensor, block_m: int, block_n: int) -> torch.Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@torch.library.custom_op("triptych::grouped_matmul", mutates_args=())
def _grouped(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, block_m: int, block_n: int
) -> torch.Tensor:
    rows, inputs = x.shape
    groups, _, outputs = weight.shape
    # No program has the rows after the last group, such as those of another rank's experts.
    out = torch.zeros(rows, outputs, dtype=x.dtype, device=x.device)
    if not out.numel() or not inputs:
        return out
    # Each group may have one tile that is not full.
    tiles = min(rows, groups + rows // block_m)
    with kernels.current_device(x):
        _grouped_kernel[(triton.cdiv(outputs, block_n), tiles)](
            *(x, weight, ends.contiguous(), out, outputs, inputs, *x.stride(), *weight.stride()),
            GROUPS=groups,
            BLOCK_GROUPS=max(2, triton.next_power_of_2(groups)),
            **_options(x.dtype, block_m, block_n),
        )
    return out


@_grouped.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, block_m: int, block_n: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _options(dtype: torch.dtype, block_m: int, block_n: int) -> dict[str, object]:
    is_float32 = dtype == torch.float32
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": BLOCK_K,
        "PRECISION": "ieee" if is_float32 else "tf32",
        # The interpreter multiplies no bfloat16.
        "UPCAST": dtype == torch.bfloat16 and kernels.interpreted(),
        "num_warps": 8 if is_float32 else 4,
        "num_stages": 2 if is_float32 else 4,
        "enable_fp_fusion": False,
    }


@triton.jit(do_not_specialize=["rows"])
def _batched_kernel(
    a,
    b,
    out,
    rows,
    outputs,
    inputs,
    a_batch_stride,
    a_stride,
    a_inner_stride,
    b_batch_stride,
    b_inner_stride,
    b_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    column_tiles = tl.cdiv(outputs, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = row < rows, column < outputs
    a_rows = a + batch * a_batch_stride + row.to(tl.int64)[:, None] * a_stride
    b_columns = b + batch * b_batch_stride + column.to(tl.int64)[None, :] * b_stride
    acc = _product(
        a_rows,
        b_columns,
        is_row,
        is_column,
        inputs,
        a_inner_stride,
        b_inner_stride,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
        UPCAST,
    )
    results = out + batch * rows * outputs + row.to(tl.int64)[:, None] * outputs + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(results, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _grouped_kernel(
    x,
    weight,
    ends,
    out,
    outputs,
    inputs,
    x_stride,
    x_inner_stride,
    group_stride,
    weight_inner_stride,
    weight_stride,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of rows of one group; programs beyond the last tile do nothing."""
    tile = tl.program_id(1)
    index = tl.arange(0, BLOCK_GROUPS)
    is_group = index < GROUPS
    end = tl.load(ends + index, mask=is_group, other=0)
    start = tl.load(ends + index - 1, mask=is_group & (index > 0), other=0)
    tiles = tl.where(is_group, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    last_tile = tl.cumsum(tiles, axis=0)
    is_mine = (tile < last_tile) & (tile >= last_tile - tiles)
    group = tl.sum(tl.where(is_mine, index, 0), axis=0)
    first = tl.sum(tl.where(is_mine, start + (tile - last_tile + tiles) * BLOCK_M, 0), axis=0)
    high = tl.sum(tl.where(is_mine, end, 0), axis=0)
    if first < high:
        row = first + tl.arange(0, BLOCK_M)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_row, is_column = row < high, column < outputs
        x_rows = x + row.to(tl.int64)[:, None] * x_stride
        matrix = weight + group.to(tl.int64) * group_stride
        acc = _product(
            x_rows,
            matrix + column.to(tl.int64)[None, :] * weight_stride,
            is_row,
            is_column,
            inputs,
            x_inner_stride,
            weight_inner_stride,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
            UPCAST,
        )
        results = out + row.to(tl.int64)[:, None] * outputs + column[None, :]
        mask = is_row[:, None] & is_column[None, :]
        tl.store(results, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    a_rows,
    b_columns,
    is_row,
    is_column,
    inputs,
    a_stride,
    b_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Float32 `[BLOCK_M, BLOCK_N]` of rows and columns at these pointers."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < inputs
        a_mask = is_row[:, None] & inside[None, :]
        b_mask = inside[:, None] & is_column[None, :]
        a = tl.load(a_rows + k.to(tl.int64)[None, :] * a_stride, mask=a_mask, other=0.0)
        b = tl.load(b_columns + k.to(tl.int64)[:, None] * b_stride, mask=b_mask, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
