"""Ten times as many clients as the queue holds, against exactly as many."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import psutil

from benchmarks import workload
from benchmarks.client import client_session
from benchmarks.metrics import percentile
from benchmarks.model import model_folder, words
from benchmarks.processes import HTTP_WORKER, RANK, proportional_memory
from benchmarks.servers.base import RunningServer, run_server
from benchmarks.servers.triptych import MODEL, Triptych

SECONDS = 60.0
CAPACITY, TIMES = 32, 10
OUTPUT_TOKENS = 32
PROBE_PERIOD_S = 0.2


@dataclass
class _Tally:
    tokens: int = 0
    refused: int = 0
    other: int = 0
    """Requests that neither succeeded nor were refused with 429 and Retry-After."""
    probes_s: list[float] = field(default_factory=list)


def measure(threads: int, *, seconds: float = SECONDS) -> dict[str, Any]:
    """Throughput, refusals and the latency of probes. Raises: Unavailable."""
    server = Triptych("triptych", variables={"TRIPTYCH_MAX_QUEUE": str(CAPACITY)})
    server.prepare()
    return asyncio.run(_measure(server, threads, seconds))


async def _measure(server: Triptych, threads: int, seconds: float) -> dict[str, Any]:
    all_words = words(model_folder())
    probe, *_ = workload.warm_up(all_words, count=1)
    async with run_server(server, probe, threads=threads, concurrency=CAPACITY) as instance:
        await _run(instance, all_words, CAPACITY, seconds / 4)  # warm-up
        full = await _run(instance, all_words, CAPACITY, seconds)
        over = await _run(instance, all_words, CAPACITY * TIMES, seconds)
    return {
        "capacity": CAPACITY,
        "clients": CAPACITY * TIMES,
        "seconds": seconds,
        "full": full,
        "over": over,
    }


async def _run(
    instance: RunningServer, all_words: list[str], clients: int, seconds: float
) -> dict[str, Any]:
    tally = _Tally()
    ([worker], [rank]) = map(instance.tree.running, (HTTP_WORKER, RANK))
    memory, cpu = proportional_memory(worker.pid), _cpu_s(rank)
    end = time.monotonic() + seconds
    async with client_session() as session:
        await asyncio.gather(
            _repeat(partial(_probe, session, instance.url, tally), end),
            *(
                _repeat(partial(_ask, session, instance.url, word, tally), end)
                for word in itertools.islice(itertools.cycle(all_words), clients)
            ),
        )
    # The requests that were running at the end are counted, and their time too.
    elapsed = seconds + time.monotonic() - end
    return {
        "tokens_per_second": tally.tokens / elapsed,
        "tokens_per_cpu_second": tally.tokens / (_cpu_s(rank) - cpu),
        "refused": tally.refused,
        "other": tally.other,
        "probe_p99_s": percentile(tally.probes_s, 99),
        "probe_max_s": max(tally.probes_s),
        "growth_bytes": proportional_memory(worker.pid) - memory,
    }


async def _repeat(send: Callable[[], Awaitable[float]], end: float) -> None:
    """Repeat `send`, which returns how long to wait before the next, until `end`."""
    while (now := time.monotonic()) < end:
        wait = await send()
        await asyncio.sleep(min(wait, max(0.0, end - now)))


async def _ask(session: aiohttp.ClientSession, url: str, word: str, tally: _Tally) -> float:
    body = {"model": MODEL, "prompt": word * 8, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        content = await response.json()
        if response.status == 200:
            tally.tokens += content["usage"]["completion_tokens"]
        elif response.status == 429 and "Retry-After" in response.headers:
            tally.refused += 1
            return float(response.headers["Retry-After"])
        else:
            tally.other += 1
    return 0.0


async def _probe(session: aiohttp.ClientSession, url: str, tally: _Tally) -> float:
    start = time.monotonic()
    async with session.get(f"{url}/livez") as response:
        await response.read()
    tally.probes_s.append(time.monotonic() - start)
    return PROBE_PERIOD_S


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
