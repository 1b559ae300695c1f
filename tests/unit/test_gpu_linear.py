"""Linear layers of the GPU path, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources

from runners.text.gpu.kernels import linear as module
from runners.text.gpu.kernels.linear import (
    BASE,
    TILES,
    Tile,
    choose_tile,
    count_parts,
    linear,
    prove_tiles,
)

CPU = torch.device("cpu")
SMALL = Tile(8, 32)
"""NumPy, which multiplies in the interpreter, gives a row the same bits in any place of 8 rows."""
WIDE = Tile(8, 64)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}
"""For sums of about a thousand products of a normal distribution."""


def operands(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "few_rows"),
    [(1, 33, 70, 64), (5, 40, 1030, 64), (70, 40, 1030, 64), (17, 96, 128, 2)],
)
def test_the_kernel_computes_a_linear_layer(
    dtype: torch.dtype,
    has_bias: bool,
    rows: int,
    outputs: int,
    inputs: int,
    few_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FEW_ROWS", few_rows)
    x, weight, bias = operands(rows, outputs, inputs, dtype)
    out = linear(x.view(1, rows, inputs), weight, bias if has_bias else None, [Tile(64, 64)])
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    assert out.dtype == dtype
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("inputs", [1100, 2048, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(
    inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the parts of its sum are computed by one program or by several."""
    monkeypatch.setattr(module, "FEW_ROWS", 4)
    parts = count_parts(40, inputs)
    assert parts == max(1, inputs // 512 // 2 * 2)
    x, weight, bias = operands(19, 40, inputs, dtype)
    whole = linear(x, weight, bias, [SMALL])
    for rows in (1, 4, 5):
        for tile in (SMALL, WIDE):
            assert torch.equal(linear(x[-rows:], weight, bias, [tile]), whole[-rows:])


def test_strided_rows_and_no_rows() -> None:
    x, weight, bias = operands(6, 20, 64)
    expected = linear(x, weight, bias, [SMALL])
    wide = torch.cat([x, x], 1)
    assert torch.equal(linear(wide[:, 64:], weight, bias, [SMALL]), expected)
    assert torch.equal(linear(x.T.contiguous().T, weight, bias, [SMALL]), expected)
    assert linear(x[:0], weight, bias, [SMALL]).shape == (0, 20)


def test_it_is_an_operator_that_a_graph_can_have() -> None:
    x, weight, bias = operands(6, 20, 64)
    arguments = x, weight, bias, 8, 32, 4, 4
    torch.library.opcheck(
        module.fixed_order_linear, arguments, test_utils=("test_schema", "test_faketensor")
    )
    with torch.inference_mode():
        linear(x.clone(), weight, bias, [SMALL])


def test_tiles_with_other_bits_are_not_used_together(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.fixed_order_linear

    def compute(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        out: torch.Tensor = original(x, *arguments)
        rows, columns = arguments[2:4]
        if (rows, columns) == (8, 16):
            out = out * (1 + 1e-6)
        if (rows, columns) == (4, 64):
            raise OutOfResources(300_000, 232_448, "shared memory")
        if (rows, columns) == (2, 64) and len(x) > 6:
            out = out * (1 + 1e-6)
        return out

    monkeypatch.setattr(module, "fixed_order_linear", compute)
    bad = Tile(8, 16), Tile(4, 64), Tile(2, 64)
    proven = prove_tiles(40, 64, torch.float32, CPU, [SMALL, *bad], WIDE)
    assert proven == (SMALL, WIDE)
    for base in bad[1:]:
        with pytest.raises((RuntimeError, OutOfResources)):
            prove_tiles(40, 64, torch.float32, CPU, [SMALL], base)


def test_the_tile_suits_the_number_of_rows() -> None:
    rows = (1, 16, 17, 64, 65, 128, 129, 512, 513, 4096)
    assert [TILES.index(choose_tile(n, TILES)) for n in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert choose_tile(1, TILES[1:]) == TILES[1]
    assert choose_tile(300, (TILES[1], TILES[2])) == TILES[2]
    assert choose_tile(1, (BASE,)) == BASE


def test_parts_depend_on_the_weight_alone() -> None:
    shapes = [(4096, 4096), (1024, 4096), (28672, 4096), (4096, 14336), (64, 64), (128256, 4096)]
    assert [count_parts(*shape) for shape in shapes] == [4, 8, 1, 4, 1, 1]
