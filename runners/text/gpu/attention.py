"""Placeholder until the kernels' branch is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class AttentionOptions:
    """Variants of attention among architectures."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionCall:
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, query, keys, values, options):
        return cls(query.shape[1], keys.shape[2])


class StepPlan:
    def __init__(
        self, device: torch.device, *, max_rows: int, max_sequences: int, table_width: int
    ) -> None:
        def z(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.starts, self.lengths, self.tables = (
            z(max_sequences + 1),
            z(max_sequences),
            z(max_sequences, table_width),
        )
        self.segment, self.position = z(max_rows), z(max_rows)

    def fill(self, counts: np.ndarray, lengths: np.ndarray, tables: np.ndarray) -> None:
        n, w = tables.shape
        rows = int(counts.sum())
        seg = np.repeat(np.arange(n), counts)
        starts = np.cumsum(counts) - counts
        pos = np.arange(rows) - np.repeat(starts - (lengths - counts), counts)
        self.tables[:n].zero_()
        self.tables[:n, :w] = torch.from_numpy(tables)
        self.segment[:rows] = torch.from_numpy(seg.astype(np.int32))
        self.position[:rows] = torch.from_numpy(pos.astype(np.int32))


class Backend(Protocol):
    name: str

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None: ...


class TorchBackend(Backend):
    name = "torch"

    def attend(self, query, keys, values, plan, out, options):
        rows = len(query)
        tables = plan.tables[plan.segment[:rows]]
        k = keys[tables].flatten(1, 2).float()
        v = values[tables].flatten(1, 2).float()
        group = query.shape[1] // k.shape[2]
        column = torch.arange(k.shape[1], device=query.device)[None]
        pos = plan.position[:rows, None]
        visible = column <= pos
        if options.window:
            visible = visible & (column > pos - options.window)
        v = v.masked_fill(~visible[:, :, None, None], 0)
        k = k.masked_fill(~visible[:, :, None, None], 0)
        q = query.float().view(rows, k.shape[2], group, -1)
        scores = torch.einsum("thgd,tnhd->thgn", q, k) * options.scale
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        if options.sinks is not None:
            s = options.sinks.float().view(1, k.shape[2], group, 1).expand(rows, -1, -1, 1)
            scores = torch.cat([scores, s], -1)
        w = scores.softmax(-1)[..., : k.shape[1]]
        out.copy_(torch.einsum("thgn,tnhd->thgd", w, v).flatten(1, 2))


def write_kv(key, value, keys, values, slots):
    keys.view(-1, *keys.shape[2:])[slots] = key
    values.view(-1, *values.shape[2:])[slots] = value


def choose_backend(calls: Any, device: Any, requested: str) -> Backend:
    return TorchBackend()
