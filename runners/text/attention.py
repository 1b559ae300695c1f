"""Packed attention: one forward over the tokens of many sequences, with attention per sequence.

transformers calls it through its AttentionInterface, under the name `PACKED`. The rows of a packed
forward (`[1, T]` tokens) are the segments of a `ForwardContext`. Everything except attention works
row by row, so a batch needs no padding. In float32 on a CPU the kernel reads the KV blocks in
place; elsewhere they are gathered for torch's attention, for all decoding rows at once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from transformers import AttentionInterface

from runners.text.cpu import Kernels, load_kernels
from runners.text.cpu.library import AttentionShape, Heads, KVPointers
from runners.text.gpu.attention import AttentionOptions
from runners.text.gpu.step import StepContext
from runners.text.paging.batch import ForwardContext, Segment, forward_context
from runners.text.paging.kv import LayerKV

PACKED = "triptych_packed"

UNSUPPORTED = ("position_bias", "indices", "block_indices")
"""Arguments of some architectures that change attention, maybe only beyond a short prompt: a parity
check might miss them."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows: query `[1, H, T, D]`, key `[1, H_kv, T, D]`, value
    `[1, H_kv, T, D_v]`.

    Returns `[1, T, H, D_v]`. `softcap` as in Gemma 2, `s_aux` (attention sinks) as in GPT-OSS.
    Raises: NotImplementedError for a mask or another argument that has no counterpart here.
    """
    if attention_mask is not None or any(others.get(name) is not None for name in UNSUPPORTED):
        raise NotImplementedError("attention with a mask that the model makes")
    context = forward_context.get()
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scale, sliding_window, softcap, s_aux)
    if isinstance(context, StepContext):
        return context.attend(layer_index, query, key, value, options), None
    layer = context.pool.layer(layer_index, key, value)
    kernels = load_kernels()
    if kernels is not None and layer.native and query.dtype == torch.float32:
        shape = (*query.shape[1::2], key.shape[1], value.shape[3], sliding_window, scale, softcap)
        return _by_kernel(kernels, context, layer, (query, key, value), shape, s_aux), None
    context.write(layer, key[0], value[0])
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    if context.singles:
        rows = context.single_rows(query.device)
        keys, values = context.read(layer, context.singles, value.shape[3])
        mask = context.single_mask(keys.shape[2], sliding_window, query)
        single = query[0, :, rows].transpose(0, 1)[:, :, None]
        out[0, rows] = _attend(single, keys, values, mask, options)[:, :, 0]
    for segment in context.chunks:
        out[0, segment.start : segment.start + segment.count] = _chunk(
            context, layer, segment, query, value.shape[3], options
        )
    return out, None


def _by_kernel(
    kernels: Kernels,
    context: ForwardContext,
    layer: LayerKV,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shape: tuple[Any, ...],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in rows)
    out = torch.empty(1, query.shape[2], query.shape[1], value.shape[3])
    if sinks is not None:
        sinks = sinks.float().contiguous()
    heads = (Heads(t.data_ptr(), t.stride(2), t.stride(1)) for t in (query, key, value))
    kernels.attention(
        *heads,
        KVPointers(layer.keys.data_ptr(), layer.values.data_ptr()),
        out.data_ptr(),
        context.layout.data_ptr(),
        len(context.segments),
        context.block_tables.data_ptr(),
        _kernel_shape(layer.values.shape[3], *shape),
        None if sinks is None else sinks.data_ptr(),
    )
    return out


@cache
def _kernel_shape(
    value_stride: int,
    heads: int,
    key_size: int,
    kv_heads: int,
    value_size: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> AttentionShape:
    return AttentionShape(
        heads, kv_heads, key_size, value_size, value_stride, window or 0, scale, softcap or 0.0
    )


def _chunk(
    context: ForwardContext,
    layer: LayerKV,
    segment: Segment,
    query: torch.Tensor,
    value_size: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention `[count, H, D_v]` of one chunk of a prompt."""
    keys, values = context.read(layer, [segment], value_size)
    keys, values = keys[:, :, : segment.end], values[:, :, : segment.end]
    mask = context.chunk_mask(segment, segment.end, options.window, query)
    rows = query[:, :, segment.start : segment.start + segment.count]
    return _attend(rows, keys, values, mask, options)[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention `[n, H, rows, D_v]` of queries `[n, H, rows, D]` over `[n, H_kv, columns, D]`."""
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            scale=options.scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = query @ keys.transpose(2, 3) * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores + mask
    if options.sinks is not None:
        column = options.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return weights[..., : keys.shape[2]] @ values


# At import, the one side effect of these modules: transformers finds the function by its name in a
# table of the process. No mask function is registered with it, so transformers creates no mask.
AttentionInterface.register(PACKED, packed_attention)
