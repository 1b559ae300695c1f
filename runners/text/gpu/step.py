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
from runners.text.gpu.plan import StepPlan, default_programs, partial_slots
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
class StepShape:
    """The sizes of a step, padding included. Steps of one shape may share a graph."""

    rows: int
    sequences: int
    kept: int
    """Rows whose logits are computed."""
    has_chunks: bool
    """Whether sequences may have more than one row."""


@dataclass(frozen=True)
class StepArrays:
    """A batch as host arrays, padded to a shape.

    Padding sequences have no row. The KV of padding rows goes to a page that nothing reads.
    """

    shape: StepShape
    ids: npt.NDArray[np.int64]
    """`[rows]`; `-1 - i` is the token that was sampled as number i."""
    positions: npt.NDArray[np.int64]
    """`[rows]`."""
    kept: npt.NDArray[np.int64]
    """`[kept]`: the rows whose logits are computed, the wanted ones first."""
    counts: npt.NDArray[np.int64]
    """`[sequences]`: rows of each sequence."""
    lengths: npt.NDArray[np.int64]
    """`[sequences]`: tokens of each sequence, its rows included."""
    tables: npt.NDArray[np.int32]
    """`[sequences, width]`: the pages of each sequence."""


def arrays_of(batch: Batch, shape: StepShape) -> StepArrays:
    """The arrays of a batch that fits a shape."""
    counts, past = np.zeros((2, shape.sequences), dtype=np.int64)
    counts[: len(batch.tokens)] = [len(tokens) for tokens in batch.tokens]
    past[: len(batch.tokens)] = batch.past
    width = max(map(len, batch.block_tables), default=1)
    tables = np.zeros((shape.sequences, width), dtype=np.int32)
    for row, table in zip(tables, batch.block_tables, strict=False):
        row[: len(table)] = np.frombuffer(table, dtype=np.int32)
    ids, positions = np.zeros((2, shape.rows), dtype=np.int64)
    tokens = [token for tokens in batch.tokens for token in tokens]
    ids[: len(tokens)] = tokens
    ends = np.cumsum(counts)
    positions[: len(tokens)] = np.arange(len(tokens)) - np.repeat(ends - counts - past, counts)
    kept = np.zeros(shape.kept, dtype=np.int64)
    wanted = ends[: len(batch.tokens)][np.array(batch.wanted, dtype=bool)] - 1
    kept[: len(wanted)] = wanted
    return StepArrays(shape, ids, positions, kept, counts, past + counts, tables)


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
            self._fill(plan)

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
        pages.write(
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            plan.slots[:rows],
            in_interpreter=self._backend.name == "triton",
        )
        # The kernel leaves out the rows of padding.
        out = query.new_zeros(1, rows, heads, value.shape[3])
        self._backend.attend(query[0].transpose(0, 1), pages, plan, out[0], options)
        return out

    def _plan(self, device: torch.device, heads: int, kv_heads: int, value_size: int) -> StepPlan:
        group, record_size = heads // kv_heads, heads * (value_size + 2)
        if (plan := self._plans.get((device, group, record_size))) is None:
            limits, pages = self._limits, self.pool.blocks
            _, prefill_tile = self._backend.tiles
            plan = StepPlan(
                device,
                max_rows=limits.rows,
                max_sequences=limits.sequences,
                max_table=min(-(-limits.context // BLOCK_SIZE), pages),
                group=group,
                record_size=record_size,
                capacity=partial_slots(pages, limits.sequences),
                prefill_tile=prefill_tile,
                programs=default_programs(device, kv_heads),
            )
            self._fill(plan)
            self._plans[device, group, record_size] = plan
        return plan

    def _fill(self, plan: StepPlan) -> None:
        arrays = self._arrays
        assert arrays is not None  # noqa: S101 - `fill` comes before a forward
        plan.fill(
            arrays.counts,
            arrays.lengths,
            arrays.tables,
            rows=arrays.shape.rows,
            padding_slot=self.pool.scratch_page * BLOCK_SIZE,
            has_chunks=arrays.shape.has_chunks,
        )
