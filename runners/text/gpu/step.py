"""What the forward of a step reads on the device: token ids, positions, pages, the attention plan.

All of it is in buffers that are allocated once, so that a graph finds it at the same addresses in
every step. The host writes a step into pinned memory, and the copies to the device wait for
nothing. `GPUModelRunner` fills them, the attention of each layer reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runners.text.gpu.attention import AttentionOptions, Backend
from runners.text.gpu.kv import PagePool
from runners.text.gpu.plan import StepPlan, partial_slots
from runners.text.paging.batch import Batch
from runners.text.paging.blocks import BLOCK_SIZE


@dataclass(frozen=True)
class StepLimits:
    """What the buffers of a step are allocated for."""

    rows: int
    """Tokens of one step."""
    sequences: int
    """Sequences of one step."""
    context: int
    """Tokens of one sequence."""


@dataclass(frozen=True)
class StepArrays:
    """A batch as host arrays; rows and sequences include the padding."""

    ids: npt.NDArray[np.int64]
    """`[rows]`; `-1 - i` is the token that was sampled as number i."""
    positions: npt.NDArray[np.int64]
    """`[rows]`."""
    kept: npt.NDArray[np.int64]
    """`[m]`: the rows whose logits are wanted, those of the padding included."""
    counts: npt.NDArray[np.int64]
    """`[n]`: rows of each sequence."""
    lengths: npt.NDArray[np.int64]
    """`[n]`: tokens of each sequence, its rows included."""
    tables: npt.NDArray[np.int32]
    """`[n, width]`: the pages of each sequence."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.ids)


def arrays_of(batch: Batch, *, sequences: int, scratch_page: int) -> StepArrays:
    """The arrays of a batch, padded to `sequences` with sequences of one token each, whose KV goes
    to `scratch_page`."""
    padding = sequences - len(batch.tokens)
    counts = np.array([*map(len, batch.tokens), *[1] * padding], dtype=np.int64)
    past = np.array([*batch.past, *[0] * padding], dtype=np.int64)
    width = max(map(len, batch.block_tables), default=1)
    tables = np.full((sequences, width), scratch_page, dtype=np.int32)
    for row, table in zip(tables, batch.block_tables, strict=False):
        row[: len(table)] = np.frombuffer(table, dtype=np.int32)
    ids = np.zeros(int(counts.sum()), dtype=np.int64)
    ids[: len(ids) - padding] = [token for tokens in batch.tokens for token in tokens]
    ends = np.cumsum(counts)
    return StepArrays(
        ids=ids,
        positions=np.arange(len(ids)) - np.repeat(ends - counts - past, counts),
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
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def next(self) -> npt.NDArray[np.int64]:
        """The buffer to write the next numbers into; waits for the copy of the last but one."""
        self._turn ^= 1
        if (event := self._copied[self._turn]) is not None:
            event.synchronize()
        buffer: npt.NDArray[np.int64] = self._staging[self._turn].numpy()
        return buffer

    def send(self, target: torch.Tensor, count: int) -> None:
        """Copy the first `count` numbers to the beginning of `target`; does not wait."""
        target[:count].copy_(self._staging[self._turn][:count], non_blocking=True)
        if self._on_gpu:
            event = torch.cuda.current_stream(target.device).record_event()
            self._copied[self._turn] = event


class StepContext:
    """A step in one forward: the attention function finds it in `forward_context`.

    There is one plan for each device and shape of heads, made when a layer of that kind first
    computes.
    """

    def __init__(self, pool: PagePool, backend: Backend, limits: StepLimits) -> None:
        self.pool = pool
        self._backend = backend
        self._limits = limits
        self._plans: dict[tuple[torch.device, int, int], StepPlan] = {}
        self._arrays: StepArrays | None = None

    def fill(self, arrays: StepArrays) -> None:
        """The step that the next forward computes; does not wait."""
        self._arrays = arrays
        for plan in self._plans.values():
            plan.fill(arrays.counts, arrays.lengths, arrays.tables)

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
        _, heads, rows, _ = query.shape
        plan = self._plan(query.device, heads, key.shape[1], value.shape[3])
        pages = self.pool.layer(layer_index, key, value)
        pages.write(key[0].transpose(0, 1), value[0].transpose(0, 1), plan.slots[:rows])
        out = query.new_empty(1, rows, heads, value.shape[3])
        self._backend.attend(query[0].transpose(0, 1), pages, plan, out[0], options)
        return out

    def _plan(self, device: torch.device, heads: int, kv_heads: int, value_size: int) -> StepPlan:
        group, record_size = heads // kv_heads, heads * (value_size + 2)
        if (plan := self._plans.get((device, group, record_size))) is None:
            assert self._arrays is not None  # noqa: S101 - `fill` comes before a forward
            limits, pages = self._limits, self.pool.blocks
            decode_tile, prefill_tile = self._backend.tiles
            plan = StepPlan(
                device,
                max_rows=limits.rows,
                max_sequences=limits.sequences,
                max_table=min(-(-limits.context // BLOCK_SIZE), pages),
                group=group,
                record_size=record_size,
                capacity=partial_slots(pages, limits.sequences),
                decode_tile=decode_tile,
                prefill_tile=prefill_tile,
                programs=_programs(device, kv_heads),
            )
            plan.fill(self._arrays.counts, self._arrays.lengths, self._arrays.tables)
            self._plans[device, group, record_size] = plan
        return plan


def _programs(device: torch.device, kv_heads: int) -> int:
    """Programs of the attention kernel per KV head: two for each multiprocessor in all."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return -(-2 * processors // kv_heads)
