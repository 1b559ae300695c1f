"""Linear layers whose bits per row do not depend on the number of rows.

cuBLAS chooses its kernel, and with it the order of a sum, by the shape. Here the order depends on
the weight alone: its input dimension is cut into a fixed number of parts, each is summed in order,
and the parts are added in order. Few rows leave most of a GPU idle, so the parts are then computed
by separate programs and added by `_add_kernel`; many rows go through all parts in one program.
Tiles of different sizes may use different instructions, so only those are used together that
`prove_tiles` has seen to give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runners.text.gpu import kernels

BLOCK_K = 64
COLUMNS = 32
"""Columns of the tile for few rows, which decides the number of parts."""
PROGRAMS = 512
"""Programs that read the weights of a layer as fast as memory delivers them, about four for each
processor of an H100. The number must not depend on the device: another number of parts has other
bits."""
MAX_PARTS = 8
MIN_PART = 512
"""Inputs of a part, at least."""
FEW_ROWS = 64
"""Up to so many rows the parts are computed in parallel."""
ORDER_GROUP = 8
"""Tiles of rows that read the same columns of the weight one after the other, from the cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The size of a program's part of the output, and how Triton compiles it."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 4

    def usable(self, dtype: torch.dtype) -> Tile:
        """This tile for a type. Float32 takes twice the shared memory for each stage."""
        if dtype != torch.float32:
            return self
        return Tile(self.rows, self.columns, 8 if self.rows >= 64 else 4, 2)


TILES = (
    Tile(16, 32, 4, 6),
    Tile(64, 32, 4, 5),
    Tile(64, 64, 4, 4),
    Tile(64, 128, 4, 4),
    Tile(128, 128, 8, 4),
)
"""From few rows to many. At 1 row a layer is bound by memory and wants many small programs; from
some hundred rows on it is bound by the tensor cores and wants large tiles."""
BASE = TILES[-1]
"""The tile whose bits the others must have."""
UP_TO_ROWS = (16, 64, 128, 512)
"""Rows up to which each tile but the last is the best one; the next larger one is next best."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    tiles: Sequence[Tile] = (BASE,),
) -> torch.Tensor:
    """`x @ weight.T + bias` for x `[..., K]` and weight `[N, K]`, in their type, summed in float32.

    `tiles` are those that `prove_tiles` returned.
    """
    rows = x.reshape(-1, x.shape[-1])
    tile = choose_tile(len(rows), tiles).usable(x.dtype)
    sizes = tile.rows, tile.columns, tile.warps, tile.stages
    result: torch.Tensor = fixed_order_linear(rows, weight, bias, *sizes)
    return result.view(*x.shape[:-1], weight.shape[0])


def choose_tile(rows: int, tiles: Sequence[Tile]) -> Tile:
    """The best of the tiles for a number of rows."""
    first = next((i for i, n in enumerate(UP_TO_ROWS) if rows <= n), len(UP_TO_ROWS))
    preferred = (*TILES[first:], *reversed(TILES[:first]))
    return next((tile for tile in preferred if tile in tiles), tiles[-1])


def count_parts(outputs: int, inputs: int) -> int:
    """Parts of the input dimension, by the shape of the weight alone."""
    parts = 1
    while (
        parts < MAX_PARTS
        and parts * triton.cdiv(outputs, COLUMNS) < PROGRAMS
        and inputs // (2 * parts) >= MIN_PART
    ):
        parts *= 2
    return parts


def prove_tiles(
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    tiles: Sequence[Tile] = TILES,
    base: Tile = BASE,
) -> tuple[Tile, ...]:
    """The tiles that give random rows the bits that the base tile gives them, the base included.

    Rows at the borders of tiles are computed in batches of several sizes. Raises: RuntimeError if
    not even the base tile gives a row the same bits alone and in a batch.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    weight, bias, x = random(outputs, inputs), random(outputs), random(2 * base.rows + 3, inputs)
    expected = linear(x, weight, bias, [base])
    proven = []
    for tile in dict.fromkeys([*tiles, base]):
        counts = {1, tile.rows - 1, tile.rows + 1, FEW_ROWS, len(x)}
        batches = [x[len(x) - n :] for n in sorted(counts)]
        same = [expected[len(x) - len(batch) :] for batch in batches]
        try:
            results = [linear(batch, weight, bias, [tile]) for batch in batches]
        except Exception:
            if tile == base:
                raise
            continue  # too much shared memory for this device, for which Triton has its own error
        if all(map(torch.equal, results, same)):
            proven.append(tile)
    if base not in proven:
        raise RuntimeError("the bits of a row of a linear layer depend on its batch")
    return tuple(proven)


@torch.library.custom_op("triptych::linear", mutates_args=())
def fixed_order_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    """`linear` of rows `[T, K]` with one tile."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    parts = count_parts(outputs, inputs)
    is_parallel = parts > 1 and rows <= FEW_ROWS
    partials = out
    if is_parallel:
        partials = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
    blocks = triton.cdiv(inputs, BLOCK_K)
    _linear_kernel[(tiles, parts if is_parallel else 1)](
        *(x, weight, out if bias is None else bias, out, partials),
        *(rows, outputs, inputs, x.stride(0), weight.stride(0)),
        triton.cdiv(blocks, parts) * BLOCK_K,
        HAS_PARTS=parts > 1,
        IS_PARALLEL=is_parallel,
        HAS_BIAS=bias is not None and not is_parallel,
        MASK=inputs % BLOCK_K != 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        ORDER_GROUP=ORDER_GROUP,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        # The interpreter multiplies no bfloat16.
        UPCAST=x.dtype == torch.bfloat16 and kernels.interpreted(),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=False,
    )
    if is_parallel:
        _add_kernel[(rows, triton.cdiv(outputs, 256))](
            *(partials, out if bias is None else bias, out, rows, outputs),
            PARTS=parts,
            HAS_BIAS=bias is not None,
            BLOCK_N=256,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


@fixed_order_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# A number of rows that is 1, or a multiple of 16, must not compile to other code.
@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,
    weight,
    bias,
    out,
    partials,
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    part_size,
    HAS_PARTS: tl.constexpr,
    IS_PARALLEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ORDER_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of the output, of one part if IS_PARALLEL and of all parts in order otherwise."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    in_group = ORDER_GROUP * tl.cdiv(outputs, BLOCK_N)
    first_tile = tl.program_id(0) // in_group * ORDER_GROUP
    group_tiles = tl.minimum(row_tiles - first_tile, ORDER_GROUP)
    row_tile = first_tile + tl.program_id(0) % in_group % group_tiles
    column_tile = tl.program_id(0) % in_group // group_tiles
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Beyond the end other rows are computed again: cheaper than a mask, and not stored.
    x_rows = x + (row % rows).to(tl.int64)[:, None] * x_stride
    weight_rows = weight + (column % outputs).to(tl.int64)[None, :] * weight_stride
    low = 0
    high = inputs
    if IS_PARALLEL:
        low = tl.program_id(1) * part_size
        high = tl.minimum(low + part_size, inputs)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(low, high, BLOCK_K):
        if MASK:
            mask = first + k < inputs
            a = tl.load(x_rows + (first + k)[None, :], mask=mask[None, :], other=0.0)
            b = tl.load(weight_rows + (first + k)[:, None], mask=mask[:, None], other=0.0)
        else:
            a = tl.load(x_rows + (first + k)[None, :])
            b = tl.load(weight_rows + (first + k)[:, None])
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if HAS_PARTS and not IS_PARALLEL:  # noqa: SIM102 - decided when it is compiled
            if (first + BLOCK_K) % part_size == 0:
                total += acc
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if HAS_PARTS and not IS_PARALLEL:
        # The last part may be shorter. If it is not, this adds zeros.
        acc = total + acc
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    offsets = row.to(tl.int64)[:, None] * outputs + column[None, :]
    mask = (row < rows)[:, None] & (column < outputs)[None, :]
    if IS_PARALLEL:
        part = tl.program_id(1).to(tl.int64) * rows * outputs
        tl.store(partials + part + offsets, acc, mask=mask)
    else:
        tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add_kernel(
    partials,
    bias,
    out,
    rows,
    outputs,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the parts of one row in order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < outputs
    pointers = partials + row * outputs + column
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(pointers + part * rows.to(tl.int64) * outputs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + column, total.to(out.dtype.element_ty), mask=mask)
