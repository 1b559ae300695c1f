"""Attention of ragged queries over paged keys and values, one kernel for decoding and for prompts.

The online softmax is that of FlashAttention-2 (arXiv:2307.08691). The keys of a sequence are cut
into splits of `split` tokens at fixed positions. The state of each split is computed alone, and the
states are merged from left to right: by the same program, or, as in Flash-Decoding, by
`_reduce_kernel` after many programs have computed one split each. Both use the same functions
without contraction of multiplications and additions, so a row's bits depend on nothing but its
query, its keys and its values. What a row does not see adds exact zeros, so skipping it changes no
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.text.gpu import kernels
from runners.text.gpu.plan import heads_per_tile

PAGE = tl.constexpr(32)
"""Tokens of a page, `BLOCK_SIZE` of `runners.text.paging.blocks`."""
REDUCED_HEADS = 4
LOG2_E = 1.4426950408889634


@torch.library.custom_op("triptych::paged_attention", mutates_args=("out", "scratch"))
def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    items: torch.Tensor,
    reductions: torch.Tensor,
    bounds: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    key_scale: float,
    value_scale: float,
    split: int,
    decode_tile: int,
    prefill_tile: int,
    programs: int,
    has_chunks: bool,
) -> None:
    """Write the attention of rows `[T, H, D]` to `out` `[T, H, D_v]`.

    `keys` and `values` are `[pages, 32, H_kv, size]` in the type of the query or in float8 (e4m3)
    with the scales given. `query_starts` is int32 `[n + 1]`, `lengths` int32 `[n]`: segment i has
    the rows `query_starts[i] : query_starts[i + 1]`, the last ones of `lengths[i]` tokens. `items`
    and `reductions` are the work (`plan_work`), `bounds` int32 `[4]` where it begins and ends:
    items of decoding rows from 0 to `bounds[1]`, those of chunks to `bounds[2]`, and the number of
    reductions. `scratch` is float32, `H * (D_v + 2)` for each slot. `window` 0 and `softcap` 0 mean
    none. Everything that changes from step to step is read on the device, `has_chunks` excepted.
    """
    heads, key_size = query.shape[1], query.shape[2]
    kv_heads, value_size = keys.shape[2], values.shape[3]
    group = heads // kv_heads
    capacity = scratch.numel() // (heads * (value_size + 2))
    states = scratch[capacity * heads * value_size :]
    has_sinks = sinks is not None
    tiles = [(decode_tile, 0, 1), (prefill_tile, 1, 2)]
    if decode_tile == prefill_tile:
        tiles = [(decode_tile, 0, 2)]
    elif not has_chunks:
        tiles.pop()
    with kernels.current_device(query):
        for block_m, first, last in tiles:
            tile_heads = heads_per_tile(block_m, group)
            grid = (programs, kv_heads, triton.cdiv(group, tile_heads))
            _attention_kernel[grid](
                *(query, keys, values, out, scratch, states, sinks if has_sinks else out),
                *(query_starts, lengths, block_tables, items, bounds),
                *(query.stride(0), query.stride(1), out.stride(0), out.stride(1)),
                *keys.stride()[:3],
                *values.stride()[:3],
                block_tables.stride(0),
                *factors(scale, softcap, key_scale),
                value_scale,
                window,
                FIRST=first,
                LAST=last,
                GROUP=group,
                HEADS=tile_heads,
                KEY_SIZE=key_size,
                VALUE_SIZE=value_size,
                BLOCK_M=block_m,
                SPLIT=split,
                WINDOW=window > 0,
                SOFTCAP=softcap > 0,
                SINKS=has_sinks,
                **launch_options(block_m, key_size, value_size, query.dtype),
            )
        _reduce_kernel[(programs, triton.cdiv(heads, REDUCED_HEADS))](
            *(out, scratch, states, sinks if has_sinks else out, reductions, bounds),
            *(out.stride(0), out.stride(1), value_scale, window),
            QUERY_HEADS=heads,
            VALUE_SIZE=value_size,
            VALUE_BLOCK=_block(value_size),
            HEADS=REDUCED_HEADS,
            SPLIT=split,
            WINDOW=window > 0,
            SINKS=has_sinks,
            num_warps=4,
            enable_fp_fusion=False,
        )


def factors(scale: float, softcap: float, key_scale: float) -> tuple[float, float]:
    """What a product of query and key is multiplied with, before the soft cap and after it.

    Logits are in units of log2(e), since the kernel takes powers of two.
    """
    if softcap > 0:
        return scale * key_scale / softcap, softcap * LOG2_E
    return 1.0, scale * key_scale * LOG2_E


def launch_options(
    block_m: int, key_size: int, value_size: int, dtype: torch.dtype
) -> dict[str, int | str | bool]:
    """The shape of the tiles over the keys, which is the same for each `block_m`, and its warps."""
    key_block, value_block = _block(key_size), _block(value_size)
    is_float32 = dtype == torch.float32
    is_wide = key_block + value_block > 256
    # A warp for each 16 rows has all columns of its rows, twice as many share longer rows. Fewer
    # than 4 would lack registers for the addresses of the keys.
    warps = max(4, block_m // (8 if is_float32 or value_block > 128 else 16))
    return {
        "KEY_BLOCK": key_block,
        "VALUE_BLOCK": value_block,
        "BLOCK_N": 32 if is_float32 or is_wide else 64,
        "PRECISION": "ieee" if is_float32 else "tf32",
        # The interpreter multiplies no bfloat16.
        "UPCAST": dtype == torch.bfloat16 and kernels.interpreted(),
        "num_warps": min(warps, 8),
        "num_stages": 2 if is_float32 else 3,
        "enable_fp_fusion": False,
    }


def _block(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


@triton.jit
def _merge(all_m, all_total, all_acc, m, total, acc):
    """The softmax state of two sets of keys: maximum, sum and weighted values `[rows, size]`."""
    new_m = tl.maximum(all_m, m)
    shift = tl.where(new_m == float("-inf"), 0.0, new_m)
    old = tl.exp2(all_m - shift)
    new = tl.exp2(m - shift)
    all_total = tl.fma(all_total, old, total * new)
    all_acc = tl.fma(all_acc, tl.broadcast_to(old[:, None], acc.shape), acc * new[:, None])
    return new_m, all_total, all_acc


@triton.jit
def _finish(m, total, acc, sinks, head, head_mask, value_scale, SINKS: tl.constexpr):
    """The output of a softmax state. A sink is one more logit of a head, without a value."""
    if SINKS:
        sink = tl.load(sinks + head, mask=head_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        new_m = tl.maximum(m, sink)
        old = tl.exp2(m - new_m)
        total = tl.fma(total, old, tl.exp2(sink - new_m))
        acc = acc * old[:, None]
    # Rows beyond the end of a tile may have seen nothing.
    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None] * value_scale


@triton.jit
def _attention_kernel(
    query,
    keys,
    values,
    out,
    partials,
    states,
    sinks,
    query_starts,
    lengths,
    block_tables,
    items,
    bounds,
    query_row_stride,
    query_head_stride,
    out_row_stride,
    out_head_stride,
    key_page_stride,
    key_token_stride,
    key_head_stride,
    value_page_stride,
    value_token_stride,
    value_head_stride,
    table_stride,
    cap_factor,
    factor,
    value_scale,
    window,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Work through items. A tile is `BLOCK_M` pairs of a query row and one of `HEADS` heads."""
    kv_head = tl.program_id(1)
    ROWS: tl.constexpr = BLOCK_M // HEADS
    ELEMENT: tl.constexpr = query.dtype.element_ty
    QUERY_HEADS = tl.num_programs(1) * GROUP
    tile = tl.arange(0, BLOCK_M)
    row_in_tile = tile // HEADS
    head_in_group = tl.program_id(2) * HEADS + tile % HEADS
    head = kv_head * GROUP + head_in_group
    tile_mask = (row_in_tile < ROWS) & (head_in_group < GROUP)
    key_column = tl.arange(0, KEY_BLOCK)
    value_column = tl.arange(0, VALUE_BLOCK)
    key_base = keys + kv_head * key_head_stride
    value_base = values + kv_head * value_head_stride
    first_item = tl.load(bounds + FIRST)
    last_item = tl.load(bounds + LAST)
    for index in range(first_item + tl.program_id(0), last_item, tl.num_programs(0)):
        segment = tl.load(items + index * 5)
        first_row = tl.load(items + index * 5 + 1)
        first_split = tl.load(items + index * 5 + 2)
        last_split = first_split + tl.load(items + index * 5 + 3)
        slot = tl.load(items + index * 5 + 4).to(tl.int64)
        start = tl.load(query_starts + segment)
        count = tl.load(query_starts + segment + 1) - start
        past = tl.load(lengths + segment) - count
        # What the rows of this tile see: the keys `oldest : end`.
        end = past + tl.minimum(first_row + ROWS, count)
        oldest = 0
        if WINDOW:
            oldest = tl.maximum(past + first_row - window + 1, 0)
            first_split = tl.maximum(first_split, oldest // SPLIT)
        row = first_row + row_in_tile
        row_mask = tile_mask & (row < count)
        position = past + row
        query_row = (start + row).to(tl.int64)
        query_offsets = query_row * query_row_stride + head * query_head_stride
        q = tl.load(
            query + query_offsets[:, None] + key_column[None, :],
            mask=row_mask[:, None] & (key_column < KEY_SIZE)[None, :],
            other=0.0,
        )
        if UPCAST:
            q = q.to(tl.float32)
        table = block_tables + segment.to(tl.int64) * table_stride
        all_m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        all_total = tl.zeros([BLOCK_M], dtype=tl.float32)
        all_acc = tl.zeros([BLOCK_M, VALUE_BLOCK], dtype=tl.float32)
        m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, VALUE_BLOCK], dtype=tl.float32)
        low = first_split * SPLIT
        high = tl.minimum(last_split * SPLIT, end)
        if WINDOW:
            low = tl.maximum(low, oldest // BLOCK_N * BLOCK_N)
        for first in range(low, high, BLOCK_N):
            token = first + tl.arange(0, BLOCK_N)
            # Leftovers in a page may be NaN, which a weight of zero does not hide.
            token_mask = token < end
            if WINDOW:
                token_mask = token_mask & (token >= oldest)
            page = tl.load(table + token // PAGE, mask=token_mask, other=0).to(tl.int64)
            offset = token % PAGE
            key_offsets = page * key_page_stride + offset * key_token_stride
            k = tl.load(
                key_base + key_offsets[None, :] + key_column[:, None],
                mask=token_mask[None, :] & (key_column < KEY_SIZE)[:, None],
                other=0.0,
            )
            value_offsets = page * value_page_stride + offset * value_token_stride
            v = tl.load(
                value_base + value_offsets[:, None] + value_column[None, :],
                mask=token_mask[:, None] & (value_column < VALUE_SIZE)[None, :],
                other=0.0,
            )
            logits = tl.dot(q, k.to(ELEMENT).to(q.dtype), input_precision=PRECISION)
            if SOFTCAP:
                decay = tl.exp2(tl.abs(logits * cap_factor) * -2.8853900817779268)
                tanh = (1.0 - decay) / (1.0 + decay)
                logits = tl.where(logits < 0.0, -tanh, tanh)
            visible = token[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (token[None, :] > position[:, None] - window)
            logits = tl.where(visible, logits, float("-inf"))
            new_m = tl.maximum(m, tl.max(logits, axis=1) * factor)
            shift = tl.where(new_m == float("-inf"), 0.0, new_m)
            old = tl.exp2(m - shift)
            negative = tl.broadcast_to(-shift[:, None], logits.shape)
            factors = tl.full(logits.shape, factor, dtype=tl.float32)
            weights = tl.exp2(tl.fma(logits, factors, negative))
            total = tl.fma(total, old, tl.sum(weights, axis=1))
            acc = acc * old[:, None]
            weights = weights.to(ELEMENT).to(q.dtype)
            v = v.to(ELEMENT).to(q.dtype)
            acc = tl.dot(weights, v, acc, input_precision=PRECISION)
            m = new_m
            if (first + BLOCK_N) % SPLIT == 0:
                all_m, all_total, all_acc = _merge(all_m, all_total, all_acc, m, total, acc)
                m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
                total = tl.zeros([BLOCK_M], dtype=tl.float32)
                acc = tl.zeros([BLOCK_M, VALUE_BLOCK], dtype=tl.float32)
        # The last split may be incomplete. If it is not, this adds zeros.
        all_m, all_total, all_acc = _merge(all_m, all_total, all_acc, m, total, acc)
        value_mask = row_mask[:, None] & (value_column < VALUE_SIZE)[None, :]
        if slot < 0:
            result = _finish(all_m, all_total, all_acc, sinks, head, row_mask, value_scale, SINKS)
            offsets = query_row * out_row_stride + head * out_head_stride
            pointers = out + offsets[:, None] + value_column[None, :]
            tl.store(pointers, result.to(out.dtype.element_ty), mask=value_mask)
        elif first_split < last_split:
            record = (slot + row_in_tile) * QUERY_HEADS + head
            pointers = partials + record[:, None] * VALUE_SIZE + value_column[None, :]
            tl.store(pointers, all_acc, mask=value_mask)
            tl.store(states + record * 2, all_m, mask=row_mask)
            tl.store(states + record * 2 + 1, all_total, mask=row_mask)


@triton.jit
def _reduce_kernel(
    out,
    partials,
    states,
    sinks,
    reductions,
    bounds,
    out_row_stride,
    out_head_stride,
    value_scale,
    window,
    QUERY_HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge the states of a row's splits, for `HEADS` heads at a time."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_mask = head < QUERY_HEADS
    column = tl.arange(0, VALUE_BLOCK)
    mask = head_mask[:, None] & (column < VALUE_SIZE)[None, :]
    for index in range(tl.program_id(0), tl.load(bounds + 3), tl.num_programs(0)):
        row = tl.load(reductions + index * 5).to(tl.int64)
        position = tl.load(reductions + index * 5 + 1)
        slot = tl.load(reductions + index * 5 + 2).to(tl.int64)
        stride = tl.load(reductions + index * 5 + 3)
        last_split = tl.load(reductions + index * 5 + 4)
        first_split = 0
        if WINDOW:
            first_split = tl.maximum(position - window + 1, 0) // SPLIT
        all_m = tl.full([HEADS], float("-inf"), dtype=tl.float32)
        all_total = tl.zeros([HEADS], dtype=tl.float32)
        all_acc = tl.zeros([HEADS, VALUE_BLOCK], dtype=tl.float32)
        for split in range(first_split, last_split):
            record = (slot + split * stride) * QUERY_HEADS + head
            pointers = partials + record[:, None] * VALUE_SIZE + column[None, :]
            acc = tl.load(pointers, mask=mask, other=0.0)
            m = tl.load(states + record * 2, mask=head_mask, other=float("-inf"))
            total = tl.load(states + record * 2 + 1, mask=head_mask, other=0.0)
            all_m, all_total, all_acc = _merge(all_m, all_total, all_acc, m, total, acc)
        result = _finish(all_m, all_total, all_acc, sinks, head, head_mask, value_scale, SINKS)
        pointers = out + row * out_row_stride + head[:, None] * out_head_stride + column[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)
