"""`python -m benchmarks.gpu`: the table on one NVIDIA GPU. NOT YET RUN: there was none.

The limit here is the GPU's memory bandwidth: a step of c sequences reads all weights and the KV of
all sequences once, so c tokens need at least that many bytes' time. Prompts are left out of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, results, table
from benchmarks.cache import Unavailable
from benchmarks.fresh import fresh
from benchmarks.limit import MEAN_CONTEXT
from benchmarks.metrics import spread
from benchmarks.model import LARGE_KV_BYTES_PER_TOKEN, large_model_folder
from benchmarks.servers.base import Server
from benchmarks.servers.mii import MII
from benchmarks.servers.transformers_serve import TransformersServe
from benchmarks.servers.triptych import Triptych

CONCURRENCIES = (1, 16, 64, 256)
FILE = Path(__file__).with_name("gpu.json")
COPY_BYTES = 2**30


def servers() -> list[Server]:
    """Ours and those that run on a GPU from the same environment."""
    return [
        Triptych("triptych-gpu", model=large_model_folder),
        TransformersServe(
            "transformers-cb-gpu",
            continuous_batching=True,
            model=large_model_folder,
            device="cuda:0",
            dtype="bfloat16",
        ),
        MII("mii-gpu", large_model_folder),
    ]


def limit(concurrency: int, weight_bytes: int, bytes_per_second: float) -> float:
    """Tokens a second that the memory bandwidth allows."""
    read = weight_bytes + concurrency * MEAN_CONTEXT * LARGE_KV_BYTES_PER_TOKEN
    return concurrency * bytes_per_second / read


def measure() -> results.Results:
    """All servers in turn. Raises: Unavailable without a GPU."""
    found = results.load(FILE)
    found["machine"] = machine.describe()
    found["gpu"] = fresh("benchmarks.gpu", 1)
    plan = table.Plan(
        servers=servers(), concurrencies=CONCURRENCIES, cpu_concurrency=None, poisson_count=0
    )
    table.measure(plan, found, lambda: results.save(found, FILE))
    return found


def report(found: results.Results) -> str:
    """A line per server and concurrency: tokens a second, and their share of the limit."""
    weights = (large_model_folder() / "model.safetensors").stat().st_size
    lines = [f"{found['gpu']['name']}, {found['gpu']['bytes_per_second'] / 1e9:.0f} GB/s"]
    for name in results.servers(found, "wall"):
        for count in results.loads(found, "wall"):
            where = {"table": "wall", "server": name, "load": count}
            speed, low, high = spread(results.values(found, "tokens_per_second", **where))
            share = speed / limit(count, weights, found["gpu"]["bytes_per_second"])
            lines.append(
                f"{name:20} {count:4}  {speed:8.1f} tok/s ({low:.1f} - {high:.1f}), "
                f"{share:.0%} of the bandwidth"
            )
    return "\n".join(lines + [f"{n}: {why}" for n, why in found["unavailable"].items()])


def main(argv: Sequence[str]) -> None:
    """Without an argument: measure. With one: describe the GPU, in the fresh process."""
    if argv:
        print(json.dumps(measure_bandwidth()))
        return
    try:
        print(report(measure()))
    except Unavailable as error:
        sys.exit(str(error))


def measure_bandwidth() -> dict[str, Any]:
    """The GPU, and how fast it copies. Raises whatever torch does without one."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    name = torch.cuda.get_device_name()
    return {"name": name, "bytes_per_second": 2 * COPY_BYTES / min(times)}


if __name__ == "__main__":
    main(sys.argv[1:])
