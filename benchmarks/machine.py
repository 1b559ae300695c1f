"""The hardware and software properties that affect speed."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.cache import ROOT

ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_int8",
       "amx_bf16")  # fmt: skip
COPY_BYTES = 256 * 2**20


def describe() -> dict[str, Any]:
    """Processor, memory, copy bandwidth and versions, as JSON values."""
    fields = _cpuinfo()
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "isa": [name for name in ISA if name in flags],
        "memory_bytes": psutil.virtual_memory().total,
        "copy_bytes_per_second": copy_bandwidth(os.cpu_count() or 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit(),
    }


def copy_bandwidth(threads: int) -> float:
    """Bytes per second, reads plus writes, of `threads` threads that copy separate arrays."""
    pairs = [(np.ones(COPY_BYTES // 8), np.zeros(COPY_BYTES // 8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def seconds() -> float:
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            return time.perf_counter() - start

        return 2 * threads * COPY_BYTES / min(seconds() for _ in range(5))


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def commit() -> str:
    """The commit of the working tree, with a plus if there are uncommitted changes."""
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],  # noqa: S607 - the location of git varies
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return process.stdout.strip()
