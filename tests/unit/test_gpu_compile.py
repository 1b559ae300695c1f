"""The Triton kernels compile for GPUs, down to machine code, with what they were designed for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arch", "shared_memory", "instruction"),
    [(80, 163 * 1024, "mma.sync"), (90, 227 * 1024, "wgmma.mma_async")],
)
def test_kernels_compile(arch: int, shared_memory: int, instruction: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.compiled_kernels", str(arch)]
    output = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    kernels = json.loads(output.stdout)
    names = {each["name"].split()[-1] for each in kernels}
    assert names == {
        *("_attention_kernel", "_reduce_kernel", "_write_kernel"),
        *("_linear_kernel", "_add_kernel", "_cutoff_kernel"),
        *("_rms_norm_kernel", "_row_sum_kernel", "_gated_kernel", "_rotary_kernel"),
        *("_batched_kernel", "_grouped_kernel"),
    }
    for each in kernels:
        assert each["assembled"] > 0
        assert each["shared"] <= shared_memory, each
    attention = [k for k in kernels if k["name"] == "llama _attention_kernel"]
    linear = [k for k in kernels if k["name"] == "torch.bfloat16 _linear_kernel"]
    # The tensor cores of this GPU are used, and fed by asynchronous copies.
    batched, grouped = (
        [k for k in kernels if k["name"] == f" {name}"]
        for name in ("_batched_kernel", "_grouped_kernel")
    )
    for each in (attention[0], linear[-1], batched[0], grouped[0]):
        assert {instruction, "cp.async"} <= set(each["instructions"]), each
