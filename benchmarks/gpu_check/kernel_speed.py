"""Speed of the kernels: attention next to the memory bandwidth, linear layers next to cuBLAS."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear as cublas_linear

from benchmarks.gpu_check.part import Context

ROWS = (1, 8, 64, 256, 2048)
LAYERS = ((4096, 4096), (6144, 4096), (28_672, 4096), (4096, 14_336), (128_256, 4096))
"""Of Llama 3 8B: one projection, that of queries, keys and values together, both of the gate, the
one down, the output."""
DECODING = ((1, 8192), (8, 2048), (64, 1024), (256, 512))
"""Sequences and their length."""
PROMPTS = ((1, 2048), (8, 256))


def measure(check: Context) -> None:
    """Record it all, in bfloat16."""
    bandwidth = check.device.copy_bandwidth()
    check.record.figure("copy_gb_per_second", bandwidth / 1e9)
    _attention(check, bandwidth)
    _linear(check)


def count_programs(device: torch.device, shape: Any) -> int:
    """Programs for each KV head such that all heads together fill the device several times."""
    if device.type != "cuda":
        return 2
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    kv_heads: int = shape.kv_heads
    return -(-4 * processors // kv_heads)


def _attention(check: Context, bandwidth: float) -> None:
    from runners.text.gpu.attention import AttentionShape, TritonBackend, VarlenBackend
    from runners.text.gpu.proof import Case, choose_backend

    device = check.device.target
    shape = AttentionShape(32, 8, 128, 128, torch.bfloat16, torch.bfloat16)
    chosen = choose_backend([shape], device)
    check.record.figure("chosen backend", f"{chosen.name} {chosen.tiles}")
    backends: dict[str, Any] = {"triton": TritonBackend(), "varlen": VarlenBackend()}
    if chosen.name == "triton":
        backends["triton"] = chosen
    programs = count_programs(device, shape)
    for name, backend in backends.items():
        if problem := backend.obstacle(shape, device):
            check.record.skip(f"speed of {name}", problem)
            continue
        for count, length in DECODING:
            case = Case(shape, device, [length] * count, backend.tiles, programs)
            rows = [(i, length - 1, length) for i in range(count)]
            seconds = _seconds(check, backend, case, rows)
            kv_bytes = 2 * count * length * shape.kv_heads * 128 * 2
            check.record.figure(
                f"{name} decoding {count} x {length}",
                {"us": seconds * 1e6, "bandwidth_share": kv_bytes / seconds / bandwidth},
            )
        for count, length in PROMPTS:
            case = Case(shape, device, [length] * count, backend.tiles, programs)
            seconds = _seconds(check, backend, case, [(i, 0, length) for i in range(count)])
            operations = 2 * 2 * count * shape.heads * 128 * length**2 / 2
            check.record.figure(
                f"{name} prompts {count} x {length}",
                {"us": seconds * 1e6, "tflops": operations / seconds / 1e12},
            )


def _seconds(check: Context, backend: Any, case: Any, rows: list[tuple[int, int, int]]) -> float:
    """The time of one layer."""
    plan = case.plan(rows, capacity=4096)
    starts = [sum(case.lengths[:i]) for i, _, _ in rows]
    query = torch.cat(
        [case.query[s + a : s + b] for s, (_, a, b) in zip(starts, rows, strict=True)]
    )
    out = query.new_empty(len(query), case.shape.heads, case.shape.value_size)
    options = case.options()
    return check.device.seconds(lambda: backend.attend(query, case.pages, plan, out, options))


def _linear(check: Context) -> None:
    from runners.text.gpu.kernels.linear import linear, prove_tiles

    check.device.require_stock()
    device = check.device.target
    total: dict[int, list[float]] = {rows: [0.0, 0.0] for rows in ROWS}
    for outputs, inputs in LAYERS:
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        tiles = prove_tiles(outputs, inputs, torch.bfloat16, device)
        ratios = {}
        for rows in ROWS:
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            times = [_time_linear(check, f, x, weight) for f in (
                lambda x, w: linear(x, w, None, tiles),  # noqa: B023 - called at once
                cublas_linear,
            )]  # fmt: skip
            total[rows] = [a + b for a, b in zip(total[rows], times, strict=True)]
            ratios[rows] = times[1] / times[0]
        check.record.figure(f"linear {outputs} x {inputs}, times cuBLAS", ratios)
    ratios = {rows: cublas / fixed for rows, (fixed, cublas) in total.items()}
    check.record.figure("linear layers together, times cuBLAS", ratios)
    text = ", ".join(f"{ratio:.2f} with {rows}" for rows, ratio in ratios.items())
    check.record.headline(f"linear layers, times cuBLAS: {text} rows")


def _time_linear(check: Context, function: Any, x: torch.Tensor, weight: torch.Tensor) -> float:
    with torch.inference_mode():
        return check.device.seconds(lambda: function(x, weight))
