"""Attention of packed rows over paged KV on a device: three ways to compute it, with one interface.

`triton` is the kernel of `kernels/attention.py`. `varlen` is FlashAttention as torch has it, where
its version takes pages of this size. `torch` has no limits and runs everywhere, one row at a time.
`proof.choose_backend` takes the fastest of those that prove correct.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

import torch

from runners.text.gpu import kernels
from runners.text.gpu.plan import StepPlan
from runners.text.paging.blocks import BLOCK_SIZE

FLOAT8 = torch.float8_e4m3fn
MAX_HEAD_SIZE = 256
"""Of the kernel: a tile of a larger head exceeds the registers."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Variants of attention among layers."""

    scale: float
    window: int | None = None
    """A row sees itself and the `window - 1` tokens before it."""
    softcap: float | None = None
    """As in Gemma 2: logits become `softcap * tanh(logits / softcap)`."""
    sinks: torch.Tensor | None = None
    """`[heads]`, as in GPT-OSS: one more logit per head, without a value."""


@dataclass(frozen=True, slots=True)
class KVPages:
    """The pages of one layer, `[pages, BLOCK_SIZE, kv_heads, size]`, both contiguous.

    Pages in float8 (e4m3) have what was written, divided by the scales.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        *,
        in_interpreter: bool = True,
    ) -> None:
        """Write keys `[T, kv_heads, size]` and values to `slots` int64 `[T]` of `token_slots`.

        `in_interpreter`: by the kernel also on a CPU, if Triton interprets there.
        """
        # Triton's interpreter rounds to float8 wrongly where the exponent changes.
        in_interpreter = in_interpreter and self.keys.dtype != FLOAT8
        if kernels.runs_on(key.device) and (key.is_cuda or in_interpreter):
            from runners.text.gpu.kernels.kv import write_kv

            key, value = _with_dense_rows(key), _with_dense_rows(value)
            pages = self.keys, self.values
            write_kv(key, value, *pages, slots, self.key_scale, self.value_scale)
            return
        _write(self.keys, key, slots, self.key_scale)
        _write(self.values, value, slots, self.value_scale)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend has to support, in one kind of layer."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads of each KV head."""
        return self.heads // self.kv_heads


class Backend(Protocol):
    """A way to compute attention."""

    @property
    def name(self) -> str:
        """The name in the configuration and in logs."""

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows of a product for decoding rows, and for chunks: `prefill_tile` of the `StepPlan`."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may record it."""

    def obstacle(self, shape: AttentionShape, device: torch.device) -> str | None:
        """Why it cannot be used, if it cannot."""

    def attend(
        self,
        query: torch.Tensor,
        pages: KVPages,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        """Write attention of rows `[T, heads, key_size]` to `out` `[T, heads, value_size]`.

        The keys and values of these rows are in the pages. Heads and rows may have any strides.
        """


@dataclass(frozen=True)
class TritonBackend:
    """The kernel of this package. Its tiles are numbers of rows in a matrix product."""

    tiles: tuple[int, int] = (64, 64)
    name: str = "triton"
    capturable: bool = True

    def obstacle(self, shape: AttentionShape, device: torch.device) -> str | None:
        """Why it cannot be used, if it cannot."""
        if not kernels.installed():
            return "Triton is not installed"
        if not kernels.runs_on(device):
            return "Triton's kernels run on a CPU only with TRITON_INTERPRET=1 in the environment"
        if max(shape.key_size, shape.value_size) > MAX_HEAD_SIZE:
            return f"heads of more than {MAX_HEAD_SIZE} numbers"
        if shape.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{shape.dtype}"
        is_cuda = device.type == "cuda"
        if (
            is_cuda
            and shape.kv_dtype == FLOAT8
            and torch.cuda.get_device_capability(device) < (8, 9)
        ):
            return "float8 needs a GPU of compute capability 8.9"
        return None

    def attend(
        self,
        query: torch.Tensor,
        pages: KVPages,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        """See `Backend`."""
        from runners.text.gpu.kernels.attention import paged_attention

        paged_attention(
            _with_dense_rows(query),
            pages.keys,
            pages.values,
            out,
            plan.scratch,
            plan.query_starts,
            plan.lengths,
            plan.block_tables,
            plan.items,
            plan.reductions,
            plan.bounds,
            options.sinks,
            options.scale,
            options.window or 0,
            options.softcap or 0.0,
            pages.key_scale,
            pages.value_scale,
            plan.split,
            *self.tiles,
            plan.programs,
            plan.has_chunks,
        )


@dataclass(frozen=True)
class VarlenBackend:
    """`torch.nn.attention.varlen`, without splits, which would depend on the batch."""

    tiles: tuple[int, int] = (64, 64)
    name: str = "varlen"
    capturable: bool = True

    def obstacle(self, shape: AttentionShape, device: torch.device) -> str | None:
        """Why it cannot be used, if it cannot."""
        if device.type != "cuda":
            return "torch has it for CUDA only"
        if not _table_parameter():
            return "this version of torch has it without pages"
        if shape.softcap is not None or shape.has_sinks:
            return "it has neither a soft cap nor sinks"
        if shape.key_size != shape.value_size:
            return "its keys and values have the same size"
        if shape.dtype not in (torch.bfloat16, torch.float16) or shape.kv_dtype != shape.dtype:
            return f"{shape.dtype} over {shape.kv_dtype}"
        return None

    def attend(
        self,
        query: torch.Tensor,
        pages: KVPages,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        """See `Backend`."""
        sequences = plan.sequences
        paging = {
            _table_parameter(): plan.block_tables[:sequences],
            "seqused_k": plan.lengths[:sequences],
        }
        window = (-1, 0) if options.window is None else (options.window - 1, 0)
        out.copy_(
            _varlen_attn()(
                query,
                pages.keys,
                pages.values,
                plan.query_starts[: sequences + 1],
                None,
                plan.max_count,
                # A graph keeps this number, so it is the largest that there can be.
                plan.block_tables.shape[1] * BLOCK_SIZE,
                scale=options.scale,
                window_size=window,
                enable_gqa=query.shape[1] != pages.keys.shape[2],
                num_splits=1,
                **paging,
            )
        )


def _varlen_attn() -> Callable[..., torch.Tensor]:
    """torch's function. Raises: ImportError if this version has none."""
    from torch.nn.attention import varlen

    function = varlen.varlen_attn
    # It returns more only where it is asked for more.
    return cast("Callable[..., torch.Tensor]", function)


@cache
def _table_parameter() -> str:
    """The name of its argument for block tables; empty if this version lacks what is needed."""
    try:
        parameters = set(inspect.signature(_varlen_attn()).parameters)
    except ImportError:
        return ""
    needed = {"seqused_k", "num_splits", "scale", "window_size", "enable_gqa"}
    names = [name for name in ("block_table", "page_table") if name in parameters]
    return names[0] if names and needed <= parameters else ""


@dataclass(frozen=True)
class TorchBackend:
    """Torch's matrix products in float32, row by row, so that no row depends on another."""

    tiles: tuple[int, int] = (64, 64)
    name: str = "torch"

    @property
    def capturable(self) -> bool:
        """It reads the lengths on the host, for which a graph cannot wait."""
        return False

    def obstacle(self, shape: AttentionShape, device: torch.device) -> str | None:
        """Nothing."""
        return None

    def attend(
        self,
        query: torch.Tensor,
        pages: KVPages,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        """See `Backend`."""
        attention_by_rows(
            query,
            pages.keys,
            pages.values,
            out,
            plan.query_starts[: plan.sequences + 1],
            plan.lengths,
            plan.block_tables,
            options.sinks,
            options.scale,
            options.window or 0,
            options.softcap or 0.0,
            pages.key_scale,
            pages.value_scale,
        )


@torch.library.custom_op("triptych::attention_by_rows", mutates_args=("out",))
def attention_by_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    key_scale: float,
    value_scale: float,
) -> None:
    """The attention of `TorchBackend`, with the arguments of `paged_attention`.

    A row's matrix products have the shape of what it sees, in any batch and any chunk.
    """
    starts = query_starts.tolist()
    for segment, (start, end) in enumerate(itertools.pairwise(starts)):
        length = int(lengths[segment])
        table = block_tables[segment, : -(-length // BLOCK_SIZE)].long()
        # Copied, so that what lies beyond the end, which may be NaN, is not read.
        segment_keys = _gather(keys, table, length) * key_scale
        segment_values = _gather(values, table, length) * value_scale
        for row in range(start, end):
            position = length - (end - row)
            first = max(position - window + 1, 0) if window else 0
            out[row] = _attend_row(
                query[row].float(),
                segment_keys[first : position + 1],
                segment_values[first : position + 1],
                sinks,
                scale,
                softcap,
            )


def _gather(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Float32 `[length, kv_heads, size]`."""
    if pages.dtype == FLOAT8:
        return pages.view(torch.uint8)[table].view(FLOAT8).flatten(0, 1)[:length].float()
    return pages[table].flatten(0, 1)[:length].float()


def _attend_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Float32 `[heads, value_size]` of a query `[heads, size]` over `[n, kv_heads, size]`."""
    heads, kv_heads = query.shape[0], keys.shape[1]
    grouped = query.reshape(kv_heads, heads // kv_heads, -1)
    logits = (grouped @ keys.permute(1, 2, 0)).reshape(heads, -1) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None]], 1)
    weights = logits.softmax(-1)[:, : keys.shape[0]]
    result = weights.reshape(kv_heads, heads // kv_heads, -1) @ values.transpose(0, 1)
    return result.reshape(heads, -1)


def _write(pages: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, scale: float) -> None:
    if pages.dtype == FLOAT8:
        largest = torch.finfo(FLOAT8).max
        rows = (rows.float() / scale).clamp(-largest, largest).to(FLOAT8).view(torch.uint8)
        pages = pages.view(torch.uint8)
    pages.flatten(0, 1).index_copy_(0, slots, rows)


def _with_dense_rows(rows: torch.Tensor) -> torch.Tensor:
    """The same `[T, heads, size]`, with the numbers of a head one after the other."""
    return rows if rows.stride(2) == 1 else rows.contiguous()
