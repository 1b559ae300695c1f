"""Part a: Triton's kernels against float64, the bits of a row in any batch, and their speed.

A dry run has tiny shapes in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from benchmarks.gpu_check import kernel_speed
from benchmarks.gpu_check.fastgen import require
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.recorder import Skipped

HEADS = ((8, 8), (32, 8), (12, 4), (16, 1), (64, 8))
"""Query heads and KV heads; each KV head has from 1 to 16 query heads."""
SIZES = ((32, 32), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 40},
    {"softcap": 20.0},
    {"has_sinks": True, "window": 40},
)
BASE_TILES = (64, 64)
OTHER_TILES = ((16, 64), (16, 16), (64, 128), (16, 128))
LAYERS = ((4096, 4096), (1024, 4096), (14_336, 4096), (4096, 14_336), (320, 96), (4096, 4100))
"""Outputs and inputs: those of Llama 3 8B, and some that no tile divides."""
ROWS = (1, 2, 8, 16, 17, 63, 64, 65, 127, 256, 600)
LINEAR_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error relative to the largest output: a few units in the last place."""
CUTOFFS = tuple(product((0, 1, 50), (1.0, 0.9, 0.3, 0.01), (0.0, 0.05)))
"""top_k, top_p, min_p"""


def run(check: Context) -> None:
    """Attention, linear layers, cutoffs; then speed. Raises: Skipped."""
    require({"triton": "triton"})
    try:
        import runners.text.gpu.kernels  # noqa: F401
    except ImportError as error:
        raise Skipped(f"this version has no kernels: {error}") from None
    _check_attention(check)
    _check_tiles(check)
    _check_linear(check)
    _check_cutoff(check)
    if not check.device.dry:
        kernel_speed.measure(check)


def attention_shapes(dry: bool) -> Iterator[Any]:
    """The grid: head sizes, groups, types, variants, float8; not each with each."""
    from runners.text.gpu.attention import FLOAT8, AttentionShape

    if dry:
        yield AttentionShape(2, 1, 24, 16, torch.float32, torch.float32)
        return
    for (heads, kv_heads), dtype in product(HEADS, DTYPES):
        yield AttentionShape(heads, kv_heads, 128, 128, dtype, dtype)
    for (key, value), dtype in product(SIZES, DTYPES):
        yield AttentionShape(12, 4, key, value, dtype, dtype)
    for variant, dtype, size in product(VARIANTS[1:], DTYPES, (64, 128)):
        yield AttentionShape(16, 4, size, size, dtype, dtype, **variant)
    if torch.cuda.get_device_capability() >= (8, 9):
        yield AttentionShape(32, 8, 128, 128, torch.bfloat16, FLOAT8)


def _check_attention(check: Context) -> None:
    """Every shape with the tile that all bits are measured by, and torch's own kernel."""
    from runners.text.gpu.attention import TritonBackend, VarlenBackend
    from runners.text.gpu.proof import find_error

    device = check.device.target
    for shape in attention_shapes(check.device.dry):
        programs = kernel_speed.count_programs(device, shape)
        problem = find_error(_triton(check, TritonBackend), shape, device, programs)
        check.record.check(f"attention {_label(shape)}", problem is None, problem or "")
        varlen = VarlenBackend()
        problem = varlen.obstacle(shape, device) or find_error(varlen, shape, device, programs)
        check.record.figure(f"varlen {_label(shape)}", problem or "same bits")


def _triton(check: Context, backend: Any, tiles: tuple[int, int] = BASE_TILES) -> Any:
    # The interpreter multiplies with NumPy, whose bits hold for products of up to 8 rows.
    return backend(check.device.pick(tiles, (8, 8)))


def _check_tiles(check: Context) -> None:
    """Which tiles for decoding and prompts give the bits of the base. None has to."""
    from runners.text.gpu.attention import AttentionShape, TritonBackend
    from runners.text.gpu.proof import find_error

    device = check.device.target
    for dtype, size in check.device.pick(product(DTYPES, (64, 128, 256)), ()):
        shape = AttentionShape(32, 8, size, size, dtype, dtype)
        programs = kernel_speed.count_programs(device, shape)
        verdicts = {
            str(tiles): find_error(TritonBackend(tiles), shape, device, programs) or "same bits"
            for tiles in OTHER_TILES
        }
        check.record.figure(f"tiles {_label(shape)}", verdicts)


def _label(shape: Any) -> str:
    parts = [f"{shape.heads}/{shape.kv_heads} heads of {shape.key_size}/{shape.value_size}"]
    parts.append(str(shape.dtype).removeprefix("torch."))
    if shape.kv_dtype != shape.dtype:
        parts.append(f"KV {shape.kv_dtype}".replace("torch.", ""))
    if shape.window is not None:
        parts.append(f"window {shape.window}")
    if shape.softcap is not None:
        parts.append("softcap")
    if shape.has_sinks:
        parts.append("sinks")
    return ", ".join(parts)


def _check_linear(check: Context) -> None:
    """Error against float64, and the bits of a row alone and in every batch."""
    from runners.text.gpu.kernels.linear import linear, prove_tiles

    device = check.device.target
    layers = check.device.pick(LAYERS, ((48, 80),))
    counts = check.device.pick(ROWS, (1, 3, 17))
    for (outputs, inputs), dtype in product(layers, check.device.pick(DTYPES, DTYPES[:1])):
        name = f"linear {outputs} x {inputs} {dtype}".replace("torch.", "")
        random = torch.Generator(device).manual_seed(outputs + inputs)
        weight, x, bias = (
            torch.randn(*size, generator=random, device=device).to(dtype)
            for size in ((outputs, inputs), (max(counts), inputs), (outputs,))
        )
        try:
            tiles = prove_tiles(outputs, inputs, dtype, device, **_few_tiles(check))
            results = {n: linear(x[:n], weight, bias, tiles) for n in counts}
        except RuntimeError as error:
            check.record.check(name, False, str(error)[:300])
            continue
        check.record.figure(f"{name}, tiles", [f"{tile.rows}x{tile.columns}" for tile in tiles])
        exact = x.double() @ weight.double().T + bias.double()
        whole = results[max(counts)]
        error_share = float((whole.double() - exact).abs().max() / exact.abs().max())
        close = error_share <= LINEAR_TOLERANCE[dtype]
        check.record.check(f"{name}: float64", close, f"off by {error_share:.2g}")
        other = [n for n, result in results.items() if not torch.equal(result, whole[:n])]
        moved = linear(x[1:], weight, bias, tiles)
        if not torch.equal(moved, whole[1:]):
            other.append(len(moved))
        detail = f"other with {other} rows" if other else f"{len(results) + 1} batches"
        check.record.check(f"{name}: same bits in every batch", not other, detail)


def _few_tiles(check: Context) -> dict[str, Any]:
    """Options of `prove_tiles` in the interpreter: small tiles."""
    from runners.text.gpu.kernels.linear import Tile

    if not check.device.dry:
        return {}
    return {"tiles": (Tile(8, 32),), "base": Tile(8, 32)}


def _check_cutoff(check: Context) -> None:
    """The kept tokens by float64, also where logits tie, and each row alone."""
    from runners.text.gpu.kernels.cutoff import cutoff

    device = check.device.target
    for vocabulary in check.device.pick((320, 50_257, 128_256), (100,)):
        cases = check.device.pick(CUTOFFS, CUTOFFS[-3:])
        random = torch.Generator(device).manual_seed(vocabulary)
        logits = 3 * torch.randn(len(cases), vocabulary, generator=random, device=device)
        logits[::2] = logits[::2].round()  # many ties
        parameters = [
            torch.tensor(column, dtype=dtype, device=device)
            for column, dtype in zip(
                zip(*cases, strict=True),
                (torch.int32, torch.float32, torch.float32),
                strict=True,
            )
        ]
        threshold = cutoff(logits, *parameters, in_interpreter=check.device.dry)
        wrong = [
            case
            for i, case in enumerate(cases)
            if not torch.equal(logits[i] >= threshold[i], kept(logits[i], *case))
        ]
        name = f"cutoff of {vocabulary} tokens"
        check.record.check(f"{name}: float64", not wrong, f"wrong: {wrong}" if wrong else "")
        alone = torch.cat(
            [
                cutoff(
                    logits[i : i + 1],
                    *(column[i : i + 1] for column in parameters),
                    in_interpreter=check.device.dry,
                )
                for i in range(len(cases))
            ]
        )
        check.record.check(f"{name}: same bits as alone", torch.equal(alone, threshold))


def kept(row: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Which tokens of a row remain, in float64, by sorting; ties with the last one remain."""
    exact = row.double()
    mask = torch.ones_like(row, dtype=torch.bool)
    if 0 < top_k < len(row):
        mask &= exact >= exact.topk(top_k).values[-1]
    if top_p < 1:
        weights = (exact - exact.max()).exp() * mask
        ordered = exact.sort(descending=True)
        cumulative = weights[ordered.indices].cumsum(0)
        first = int((cumulative >= _float32(top_p) * cumulative[-1]).int().argmax())
        mask &= exact >= ordered.values[first]
    if min_p > 0:
        mask &= row >= row.max() + torch.tensor(min_p).log().to(row.device)
    return mask


def _float32(value: float) -> float:
    """A number as the kernel gets it."""
    return float(torch.tensor(value, dtype=torch.float32))
