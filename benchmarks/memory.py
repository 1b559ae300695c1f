"""Memory of a full queue: 256 concurrent requests against a small KV cache."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import psutil

from benchmarks import workload
from benchmarks.client import run_closed_loop
from benchmarks.model import KV_BYTES_PER_TOKEN, model_folder, words
from benchmarks.processes import RANK, proportional_memory
from benchmarks.servers.base import RunningServer, run_server
from benchmarks.servers.triptych import Triptych

REQUESTS = 256
KV_TOKENS = 4096
OUTPUT_TOKENS = (8, 48)
SAMPLE_S = 0.25


def measure(threads: int, *, requests: int = REQUESTS) -> dict[str, Any]:
    """Memory of the rank process in bytes, idle and at its peak. Raises: Unavailable."""
    server = Triptych("triptych", variables={"TRIPTYCH_MAX_KV_TOKENS": str(KV_TOKENS)})
    server.prepare()
    return asyncio.run(_measure(server, threads, requests))


async def _measure(server: Triptych, threads: int, count: int) -> dict[str, Any]:
    all_words = words(model_folder())
    probe, *warm = workload.warm_up(all_words, count=5)
    async with run_server(server, probe, threads=threads, concurrency=32) as instance:
        await run_closed_loop(
            instance.url, instance.dialect, warm, concurrency=4, tree=instance.tree
        )
        [rank] = instance.tree.running(RANK)
        ready = proportional_memory(rank.pid)
        start = time.monotonic()
        peak, failed = await _flood(instance, rank, _requests(all_words, count))
        seconds = time.monotonic() - start
    bound = KV_TOKENS * KV_BYTES_PER_TOKEN
    return {
        "requests": count,
        "failed": failed,
        "seconds": seconds,
        "ready_bytes": ready,
        "peak_bytes": peak,
        "kv_tokens": KV_TOKENS,
        "kv_bound_bytes": bound,
        "share": (peak - ready) / bound,
    }


async def _flood(
    instance: RunningServer, rank: psutil.Process, requests: list[workload.Request]
) -> tuple[int, list[str]]:
    """Send all requests at once. Returns the rank's peak memory in bytes and the failures."""
    run = asyncio.create_task(
        run_closed_loop(
            instance.url, instance.dialect, requests, concurrency=len(requests), tree=instance.tree
        )
    )
    peak = 0
    while not run.done():
        peak = max(peak, await asyncio.to_thread(proportional_memory, rank.pid))
        await asyncio.wait([run], timeout=SAMPLE_S)
    records, _ = run.result()
    return peak, [record.problem for record in records if record.problem is not None]


def _requests(all_words: list[str], count: int) -> list[workload.Request]:
    rng = random.Random(workload.SEED)  # noqa: S311 - not cryptographic
    return [
        workload.sized(
            rng, all_words, rng.randint(*workload.PROMPT_TOKENS), rng.randint(*OUTPUT_TOKENS)
        )
        for _ in range(count)
    ]
