"""Packed attention: one forward over the tokens of many sequences, attention done per sequence.

Registered with transformers' AttentionInterface under `PACKED`. The rows of a packed forward
(`[1, T]` tokens) belong to the segments of a `Step`; everything but attention is row-wise, so no
padding exists. On a CPU in float32 our kernel reads the blocks where they lie; elsewhere they are
gathered for torch's own attention, all decoding rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from transformers import AttentionInterface

from runners.text.cpu import Kernels, load_kernels
from runners.text.cpu.library import AttentionShape, Heads, Pool
from runners.text.paging.kv import LayerKV
from runners.text.paging.step import Segment, Step, current

PACKED = "triptych_packed"

UNKNOWN = ("position_bias", "indices", "block_indices")
"""What some architectures hand over beside a mask, and no proof by a short prompt would miss."""


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
    """Attention of packed rows. Shapes: query `[1, H, T, D]`, key and value `[1, H_kv, T, D]`.

    Returns `[1, T, H, D_v]`. `softcap` as in Gemma 2, `s_aux` (attention sinks) as in GPT-OSS.
    """
    if attention_mask is not None or any(others.get(name) is not None for name in UNKNOWN):
        raise NotImplementedError("attention with a mask of the model's own")
    step = current.get()
    layer = step.pool.layer(module.layer_idx, key, value)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernels = load_kernels()
    if kernels is not None and layer.native and query.dtype == torch.float32:
        shape = (*query.shape[1::2], key.shape[1], value.shape[3], sliding_window, scale, softcap)
        return _by_kernel(kernels, step, layer, (query, key, value), shape, s_aux), None
    options = _Options(scale, sliding_window, softcap, s_aux)
    step.write(layer, key[0], value[0])
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    if step.singles:
        rows = step.single_rows(query.device)
        keys, values = step.read(layer, step.singles, value.shape[3])
        mask = step.single_mask(keys.shape[2], sliding_window, query)
        single = query[0, :, rows].transpose(0, 1)[:, :, None]
        out[0, rows] = _attend(single, keys, values, mask, options)[:, :, 0]
    for segment in step.chunks:
        out[0, segment.start : segment.start + segment.count] = _chunk(
            step, layer, segment, query, value.shape[3], options
        )
    return out, None


@dataclass(frozen=True, slots=True)
class _Options:
    """What varies between architectures."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def _by_kernel(
    kernels: Kernels,
    step: Step,
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
        Pool(layer.keys.data_ptr(), layer.values.data_ptr()),
        out.data_ptr(),
        step.layout.data_ptr(),
        len(step.segments),
        step.tables.data_ptr(),
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
    step: Step,
    layer: LayerKV,
    segment: Segment,
    query: torch.Tensor,
    value_size: int,
    options: _Options,
) -> torch.Tensor:
    """`[count, H, D_v]` of one piece of a prompt."""
    keys, values = step.read(layer, [segment], value_size)
    keys, values = keys[:, :, : segment.end], values[:, :, : segment.end]
    mask = step.chunk_mask(segment, segment.end, options.window, query)
    rows = query[:, :, segment.start : segment.start + segment.count]
    return _attend(rows, keys, values, mask, options)[0].transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    options: _Options,
) -> torch.Tensor:
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


# No mask function is registered beside it: transformers then builds no mask tensor.
AttentionInterface.register(PACKED, packed_attention)
