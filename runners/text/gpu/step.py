"""What the forward of a step reads on the device: token ids, positions, KV slots, block tables.

All of it is in buffers that are allocated once, so that a graph finds it at the same addresses in
every step. The host writes a step into pinned memory, and the copies to the device wait for
nothing. `GPUModelRunner` fills them, the attention of each layer reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runners.text.gpu.attention import AttentionOptions, Backend, StepPlan, write_kv
from runners.text.gpu.kv import PagePool
from runners.text.paging.batch import Batch
from runners.text.paging.blocks import BLOCK_SIZE


@dataclass(frozen=True)
class StepArrays:
    """A batch as host arrays; rows and sequences include the padding."""

    ids: np.ndarray
    """int64 `[rows]`; `-1 - i` is the token that was sampled as number i."""
    positions: np.ndarray
    """int64 `[rows]`."""
    slots: np.ndarray
    """int64 `[rows]`: where each row's KV goes, page times `BLOCK_SIZE` plus offset."""
    kept: np.ndarray
    """int64 `[m]`: the rows whose logits are wanted, those of the padding included."""
    counts: np.ndarray
    """int32 `[n]`: rows of each sequence."""
    lengths: np.ndarray
    """int32 `[n]`: tokens of each sequence, its rows included."""
    tables: np.ndarray
    """int32 `[n, width]`: the pages of each sequence."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.ids)


def arrays_of(batch: Batch, *, sequences: int, scratch_page: int) -> StepArrays:
    """The arrays of a batch, padded to `sequences` with sequences of one token each, whose KV goes
    to `scratch_page`."""
    padding = sequences - len(batch.tokens)
    counts = np.array([*map(len, batch.tokens), *[1] * padding], dtype=np.int32)
    past = np.array([*batch.past, *[0] * padding], dtype=np.int32)
    width = max(map(len, batch.block_tables), default=1)
    tables = np.full((sequences, width), scratch_page, dtype=np.int32)
    for row, table in zip(tables, batch.block_tables, strict=False):
        row[: len(table)] = np.frombuffer(table, dtype=np.int32)
    ids = np.zeros(int(counts.sum()), dtype=np.int64)
    ids[: len(ids) - padding] = [token for tokens in batch.tokens for token in tokens]
    ends = np.cumsum(counts, dtype=np.int64)
    positions = np.arange(len(ids)) - np.repeat(ends - counts - past, counts)
    pages = tables[np.repeat(np.arange(sequences), counts), positions // BLOCK_SIZE]
    return StepArrays(
        ids=ids,
        positions=positions,
        slots=pages.astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE,
        kept=ends[np.array([*batch.wanted, *[True] * padding], dtype=bool)] - 1,
        counts=counts,
        lengths=past + counts,
        tables=tables,
    )


class PinnedCopy:
    """int64 numbers on the way to a device, through two pinned buffers that take turns.

    The copy of a step may still be under way while the next step is written.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._staging = [
            torch.zeros(size, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        self._turn = 0

    def next(self) -> np.ndarray:
        """The buffer to write the next numbers into; waits for the copy of the last but one."""
        self._turn ^= 1
        if self._on_gpu:
            self._copied[self._turn].synchronize()
        buffer: np.ndarray = self._staging[self._turn].numpy()
        return buffer

    def send(self, target: torch.Tensor, count: int) -> None:
        """Copy the first `count` numbers to the beginning of `target`; does not wait."""
        target[:count].copy_(self._staging[self._turn][:count], non_blocking=True)
        if self._on_gpu:
            self._copied[self._turn].record(torch.cuda.current_stream(target.device))


class DeviceStep:
    """The buffers of one device: where the rows' KV goes, and the plan of their attention."""

    def __init__(
        self, device: torch.device, *, max_rows: int, max_sequences: int, max_pages: int
    ) -> None:
        self.device = device
        self.slots = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.plan = StepPlan(
            device, max_rows=max_rows, max_sequences=max_sequences, table_width=max_pages
        )
        self._copy = PinnedCopy(max_rows, device)

    def fill(self, arrays: StepArrays) -> None:
        """Copy a step to the device; does not wait."""
        self._copy.next()[: arrays.rows] = arrays.slots
        self._copy.send(self.slots, arrays.rows)
        self.plan.fill(arrays.counts, arrays.lengths, arrays.tables)


class StepContext:
    """A step in one forward: the attention function finds it in `forward_context`.

    `create` makes the buffers of a device, which happens when a layer first computes there.
    """

    def __init__(
        self, pool: PagePool, backend: Backend, create: Callable[[torch.device], DeviceStep]
    ) -> None:
        self.pool = pool
        self._backend = backend
        self._create = create
        self._steps: dict[torch.device, DeviceStep] = {}
        self._arrays: StepArrays | None = None

    def fill(self, arrays: StepArrays) -> None:
        """The step that the next forward computes; does not wait."""
        self._arrays = arrays
        for step in self._steps.values():
            step.fill(arrays)

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention `[1, T, H, D_v]` of query `[1, H, T, D]`, key `[1, H_kv, T, D]`, value
        `[1, H_kv, T, D_v]`; writes keys and values to the KV cache first."""
        step = self._step(query.device)
        keys, values = self.pool.layer(layer_index, key, value)
        rows = query.shape[2]
        write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, step.slots[:rows])
        out = query.new_zeros(1, rows, query.shape[1], value.shape[3])
        self._backend.attend(query[0].transpose(0, 1), keys, values, step.plan, out[0], options)
        return out

    def _step(self, device: torch.device) -> DeviceStep:
        if (step := self._steps.get(device)) is None:
            assert self._arrays is not None  # noqa: S101 - a forward follows `fill`
            step = self._steps[device] = self._create(device)
            step.fill(self._arrays)
        return step
