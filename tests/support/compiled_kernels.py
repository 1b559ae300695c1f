"""Compile the Triton kernels for a GPU that is not there: `python -m ... 90` prints them as JSON.

The launchers run as usual on CPU tensors, with their own options, but each launch only compiles.
Needs a process without TRITON_INTERPRET. Every kernel goes through ptxas, which Triton brings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from runners.text.gpu import kernels
from runners.text.gpu.attention import FLOAT8, AttentionShape, TritonBackend
from runners.text.gpu.kernels import cutoff_kernel, matmul, rows
from runners.text.gpu.kernels.linear import TILES, linear
from runners.text.gpu.proof import Case

HALF = torch.bfloat16
LAYERS = {
    "llama": AttentionShape(8, 2, 128, 128, HALF, HALF),
    "gemma2": AttentionShape(4, 2, 256, 256, HALF, HALF, window=40, softcap=50.0),
    "gpt-oss": AttentionShape(16, 2, 64, 64, HALF, HALF, window=40, has_sinks=True),
    "float8": AttentionShape(4, 4, 80, 80, HALF, FLOAT8),
    # Small, since code for float32 has each product of a tile.
    "float32": AttentionShape(6, 2, 32, 32, torch.float32, torch.float32),
}


class _Driver:
    """What the compiler asks a driver for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_all(arch: int) -> list[dict[str, object]]:
    """Name, shared memory in bytes and matrix instructions of every kernel."""
    driver.set_active(_Driver(arch))
    compiled: list[dict[str, object]] = []
    layer = ""

    def compile_only(self: Any, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            kernel = self.warmup(*arguments, grid=grid, **options)
            names = ("wgmma.mma_async", "mma.sync", "cp.async")
            compiled.append(
                {
                    "name": f"{layer} {self.fn.__name__}",
                    "shared": kernel.metadata.shared,
                    "instructions": [name for name in names if name in kernel.asm["ptx"]],
                    "assembled": len(kernel.asm["cubin"]),
                }
            )

        return launch

    JITFunction.__getitem__ = compile_only
    kernels.runs_on = lambda device: True
    for name, shape in LAYERS.items():
        if name != "llama" and arch < 90:  # the others take as long, and float8 cannot
            continue
        layer = name
        case = Case(shape, torch.device("cpu"), [40, 40], (64, 64))
        for tiles in [(64, 64), (16, 128)] if name == "llama" else [(64, 64)]:
            backend = TritonBackend(tiles)
            case.tiles = tiles
            case.attend(backend, [(0, 39, 40), (1, 0, 40)], case.options(shape.window), 8)
    for dtype, tile, count in (
        (HALF, TILES[0], 4),  # parts in several programs
        (HALF, TILES[-1], 100),
        (torch.float32, TILES[0], 100),
    ):
        layer = str(dtype)
        weight = torch.zeros(128, 1024, dtype=dtype)
        linear(torch.zeros(count, 1024, dtype=dtype), weight, weight[:, 0], [tile])
    layer = ""
    for size in (128, 4096):
        rows.rms_norm(
            torch.zeros(4, size, dtype=HALF), torch.zeros(size, dtype=HALF), 1e-6, 0, True
        )
    rows.row_sum(torch.zeros(4, 4096))
    hidden = torch.zeros(4, 4096, dtype=HALF)
    rows.gated(hidden, hidden, "silu")
    rows.gated(hidden, hidden, "gelu_tanh")
    heads = torch.zeros(1, 4, 32, 128, dtype=HALF).transpose(1, 2)
    rows.rotary(heads, heads[:, :8], heads[:, 0], heads[:, 0])
    for dtype in (HALF, torch.float32):
        a, b = torch.zeros(2, 100, 128, dtype=dtype), torch.zeros(2, 128, 128, dtype=dtype)
        matmul.batched(a, b.mT)
        matmul.grouped(a[0], b.mT, torch.ones(2).int())
    ones = torch.ones(1)
    cutoff_kernel.launch(torch.zeros(1, 10_000), ones.int(), ones, ones)
    return compiled


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
