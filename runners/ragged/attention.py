"""Packed attention: one forward over the tokens of many sequences, attention done per sequence.

Registered with transformers' AttentionInterface under `PACKED`. The rows of a packed forward
(`[1, T]` tokens) belong to `Segment`s; everything but attention is row-wise, so no padding exists.
Per-sequence SDPA measured fastest on CPUs: faster than padded slots and far faster than gathering
blocks.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from transformers import AttentionInterface

from runners.ragged.kv import SequenceKV

PACKED = "triptych_packed"


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start : start + count` of a packed forward: the next tokens of one sequence."""

    kv: SequenceKV
    start: int
    count: int


segments: ContextVar[list[Segment]] = ContextVar("segments")
"""The segments of the forward that is running."""


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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows. Shapes: query `[1, H, T, D]`, key and value `[1, H_kv, T, D]`.

    Returns `[1, T, H, D_v]`. `softcap` as in Gemma 2, `s_aux` (attention sinks) as in GPT-OSS.
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for segment in segments.get():
        rows = slice(segment.start, segment.start + segment.count)
        keys, values = segment.kv.append(module.layer_idx, key[0, :, rows], value[0, :, rows])  # type: ignore[arg-type]
        mask = None
        if segment.count == 1 and sliding_window:
            keys, values = keys[:, -sliding_window:], values[:, -sliding_window:]
        elif segment.count > 1:
            mask = causal_mask(segment.kv.length, segment.count, sliding_window, query)
        attend = _attend if softcap is None and s_aux is None else _attend_by_hand
        result = attend(query[:, :, rows], keys[None], values[None], mask, scaling, softcap, s_aux)
        out[0, rows] = result[0].transpose(0, 1)
    return out, None


def causal_mask(
    past: int, count: int, sliding_window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """Additive mask `[count, past + count]`: each row sees itself and what came before it."""
    rows = torch.arange(past, past + count, device=like.device)[:, None]
    columns = torch.arange(past + count, device=like.device)[None]
    visible = columns <= rows
    if sliding_window:
        visible &= columns > rows - sliding_window
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~visible, float("-inf"))


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    *_: object,
) -> torch.Tensor:
    grouped = query.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )


def _attend_by_hand(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return weights[..., : keys.shape[2]] @ values


# No mask function is registered beside it: transformers then builds no mask tensor.
AttentionInterface.register(PACKED, packed_attention)
