"""`python -m benchmarks.gpu`: the table on one NVIDIA GPU. NOT YET RUN, for lack of a GPU.

The limit is the GPU's memory bandwidth: a decode step of c sequences reads all weights and the KV
of all sequences once, so c tokens take at least as long as reading those bytes. Prefill is not
counted.
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
from benchmarks.isolated import run_isolated
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
    """Triptych and the peers that run on a GPU in the same environment."""
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
    """Maximum tokens per second at this memory bandwidth."""
    bytes_per_step = weight_bytes + concurrency * MEAN_CONTEXT * LARGE_KV_BYTES_PER_TOKEN
    return concurrency * bytes_per_second / bytes_per_step


def measure() -> results.Results:
    """Measure every server in turn. Raises: Unavailable without a GPU."""
    data = results.load(FILE)
    data["machine"] = machine.describe()
    data["gpu"] = run_isolated("benchmarks.gpu", 1)
    plan = table.Plan(
        servers=servers(), concurrencies=CONCURRENCIES, cpu_concurrency=None, poisson_count=0
    )
    table.measure(plan, data, lambda: results.save(data, FILE))
    return data


def report(data: results.Results) -> str:
    """One line per server and concurrency: tokens per second and their share of the limit."""
    weights = (large_model_folder() / "model.safetensors").stat().st_size
    lines = [f"{data['gpu']['name']}, {data['gpu']['bytes_per_second'] / 1e9:.0f} GB/s"]
    for name in results.servers(data, "wall"):
        for count in results.loads(data, "wall"):
            where = {"table": "wall", "server": name, "load": count}
            speed, low, high = spread(results.values(data, "tokens_per_second", **where))
            share = speed / limit(count, weights, data["gpu"]["bytes_per_second"])
            lines.append(
                f"{name:20} {count:4}  {speed:8.1f} tok/s ({low:.1f} - {high:.1f}), "
                f"{share:.0%} of the bandwidth"
            )
    return "\n".join(lines + [f"{n}: {reason}" for n, reason in data["unavailable"].items()])


def main(argv: Sequence[str]) -> None:
    """Without an argument: measure. With one: describe the GPU, in the new process."""
    if argv:
        print(json.dumps(measure_bandwidth()))
        return
    try:
        print(report(measure()))
    except Unavailable as error:
        sys.exit(str(error))


def measure_bandwidth() -> dict[str, Any]:
    """The GPU's name and copy bandwidth in bytes per second. Raises torch's error without a GPU."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name()
    return {"name": name, "bytes_per_second": 2 * COPY_BYTES / min(times)}


if __name__ == "__main__":
    main(sys.argv[1:])
