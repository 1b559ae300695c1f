"""Operators on rows: RMS norm, sums, gated activations and rotary embeddings, one launch each.

What a row gives depends on nothing but the row: its sum has an order that the length alone decides.
Values are rounded where Hugging Face's modules round them.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from runners.text.gpu import kernels

Activation = Literal["silu", "gelu_tanh"]

MAX_NORM_SIZE = 16384
"""Numbers of a row that is normalized: a program holds it in registers."""
TILE = 1024
"""Numbers that a program holds at least: it takes several rows if they are short."""
SUM_BLOCK = 1024
GATE_BLOCK = 1024
ROTARY_NUMBERS = 512
"""Pairs of numbers that a program rotates, at most, if heads are no larger."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> torch.Tensor:
    """`x / rms(x) * (offset + weight)` over the last dimension, in float32.

    With `rounds_first`, as in Llama, `x / rms(x)` is rounded to x's type before the product, whose
    type is the common one of x and weight. Otherwise, as in Gemma, the product is rounded to x's
    type. x is `[..., n]` with n up to `MAX_NORM_SIZE`.
    """
    result: torch.Tensor = _rms_norm(x, weight, eps, offset, rounds_first)
    return result


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Float32 sums over the last dimension of x `[..., n]`: float32 `[...]`."""
    result: torch.Tensor = _row_sum(x)
    return result


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`activation(gate) * up`, both rounded to their type; `[..., n]`."""
    result: torch.Tensor = _gated(gate, up, activation == "silu")
    return result


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama's `apply_rotary_pos_emb` for query `[1, H, T, D]` and key `[1, H_kv, T, D]` with any
    strides; cos and sin are `[1, T, D]`, all of one type.

    In the results the heads of a token are one after the other, as attention reads them.
    """
    rotated_query, rotated_key = _rotary(query, key, cos, sin)
    return rotated_query, rotated_key


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous.

    Triton compiles another kernel for memory that is not aligned, which may sum in another order.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@torch.library.custom_op("triptych::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> torch.Tensor:
    size = x.shape[-1]
    dtype = torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not (rows := x.numel() // size):
        return out
    block = triton.next_power_of_2(size)
    tile_rows = max(1, TILE // block)
    with kernels.current_device(x):
        _rms_norm_kernel[(triton.cdiv(rows, tile_rows),)](
            *(_dense(x), _dense(weight), out, rows, eps, offset),
            SIZE=size,
            BLOCK=block,
            ROWS=tile_rows,
            ROUNDS_FIRST=rounds_first,
            num_warps=min(16, max(1, block * tile_rows // 512)),
            enable_fp_fusion=False,
        )
    return out


@_rms_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("triptych::row_sum", mutates_args=())
def _row_sum(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows := out.numel():
        with kernels.current_device(x):
            _row_sum_kernel[(rows,)](
                *(_dense(x), out, x.shape[-1]), BLOCK=SUM_BLOCK, num_warps=4, enable_fp_fusion=False
            )
    return out


@_row_sum.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


@torch.library.custom_op("triptych::gated", mutates_args=())
def _gated(gate: torch.Tensor, up: torch.Tensor, is_silu: bool) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not out.numel():
        return out
    size = gate.shape[-1]
    gate, up = (
        each if each.stride(-1) == 1 else each.contiguous()
        for each in (gate.reshape(-1, size), up.reshape(-1, size))
    )
    blocks = triton.cdiv(size, GATE_BLOCK)
    with kernels.current_device(gate):
        _gated_kernel[(len(gate) * blocks,)](
            *(gate, up, out, blocks, size, gate.stride(0), up.stride(0)),
            IS_SILU=is_silu,
            BLOCK=GATE_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


@_gated.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, is_silu: bool) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("triptych::rotary", mutates_args=())
def _rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _, heads, rows, size = query.shape
    kv_heads = key.shape[1]
    results = _empty_heads(query), _empty_heads(key)
    if not rows:
        return results
    query, key, cos, sin = (
        each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, cos, sin)
    )
    half = triton.next_power_of_2(size // 2)
    block = max(1, min(ROTARY_NUMBERS // half, triton.next_power_of_2(heads)))
    blocks = triton.cdiv(heads, block) + triton.cdiv(kv_heads, block)
    with kernels.current_device(query):
        _rotary_kernel[(rows, blocks)](
            *(query, key, cos, sin, *results, heads, kv_heads),
            *(query.stride(1), query.stride(2), key.stride(1), key.stride(2)),
            *(cos.stride(1), sin.stride(1)),
            SIZE=size // 2,
            BLOCK_HALF=half,
            BLOCK_HEADS=block,
            num_warps=4 if half * block >= 256 else 1,
            enable_fp_fusion=False,
        )
    return results


@_rotary.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_heads(query), _empty_heads(key)


def _empty_heads(x: torch.Tensor) -> torch.Tensor:
    """Memory for `[1, H, T, D]` that is contiguous as `[1, T, H, D]`."""
    _, heads, rows, size = x.shape
    return torch.empty(1, rows, heads, size, dtype=x.dtype, device=x.device).transpose(1, 2)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x,
    weight,
    out,
    rows,
    eps,
    offset,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < SIZE)[None, :]
    offsets = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    variance = tl.sum(values * values, axis=1) / SIZE
    values = values * tl.rsqrt(variance + eps)[:, None]
    if ROUNDS_FIRST:
        values = values.to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32) + offset
    tl.store(out + offsets, (factor[None, :] * values).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _row_sum_kernel(x, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, size, BLOCK):
        mask = first + column < size
        total += tl.load(x + row * size + first + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, axis=0))


@triton.jit
def _gated_kernel(
    gate, up, out, blocks, size, gate_stride, up_stride, IS_SILU: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    # For GELU, because 0.5 * (1 + tanh(a)) is 1 / (1 + exp(-2 a)).
    argument = x if IS_SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    # Where an argument is lower, the result is 0 but for less than 1e-32.
    x = x / (1.0 + tl.exp(-tl.maximum(argument, -80.0)))
    x = x.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, (x * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "kv_heads"])
def _rotary_kernel(
    query,
    key,
    cos,
    sin,
    query_out,
    key_out,
    heads,
    kv_heads,
    query_head_stride,
    query_row_stride,
    key_head_stride,
    key_row_stride,
    cos_stride,
    sin_stride,
    SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks = tl.cdiv(heads, BLOCK_HEADS)
    cos += row * cos_stride
    sin += row * sin_stride
    if block < query_blocks:
        _rotate(
            query + row * query_row_stride,
            cos,
            sin,
            query_out + row * heads * 2 * SIZE,
            block * BLOCK_HEADS,
            heads,
            query_head_stride,
            SIZE,
            BLOCK_HALF,
            BLOCK_HEADS,
        )
    else:
        _rotate(
            key + row * key_row_stride,
            cos,
            sin,
            key_out + row * kv_heads * 2 * SIZE,
            (block - query_blocks) * BLOCK_HEADS,
            kv_heads,
            key_head_stride,
            SIZE,
            BLOCK_HALF,
            BLOCK_HEADS,
        )


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    first_head,
    heads,
    head_stride,
    SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Some heads of one row; each operation is rounded, as torch's are."""
    dtype = out.dtype.element_ty
    head = first_head + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_HALF)
    inside = column < SIZE
    mask = (head < heads)[:, None] & inside[None, :]
    pointers = x + head.to(tl.int64)[:, None] * head_stride + column[None, :]
    low = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(pointers + SIZE, mask=mask, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + column + SIZE, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + column + SIZE, mask=inside, other=0.0).to(tl.float32)[None, :]
    rotated_low = (low * cos_low).to(dtype).to(tl.float32) - (high * sin_low).to(dtype).to(
        tl.float32
    )
    rotated_high = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(
        tl.float32
    )
    results = out + head.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
    tl.store(results, rotated_low.to(dtype), mask=mask)
    tl.store(results + SIZE, rotated_high.to(dtype), mask=mask)
