"""How a long prompt delays running streams: the longest gap between two of their tokens."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from benchmarks import workload
from benchmarks.cache import Unavailable
from benchmarks.client import client_session, send_request
from benchmarks.metrics import gaps, percentile
from benchmarks.model import model_folder, words
from benchmarks.servers.base import RunningServer, run_server
from benchmarks.servers.triptych import Triptych

STREAMS = 8
STREAM_TOKENS = 400
LONG_PROMPT = 4000
SETTLE_S = 4.0
"""Seconds of undisturbed streaming before the long prompt is sent."""


def measure(threads: int, *, long_prompt: int = LONG_PROMPT) -> dict[str, Any]:
    """Gaps in seconds, before and during the long prompt's prefill. Raises: Unavailable."""
    server = Triptych("triptych")
    server.prepare()
    return asyncio.run(_measure(server, threads, long_prompt))


async def _measure(server: Triptych, threads: int, long_prompt: int) -> dict[str, Any]:
    probe, *warm = workload.warm_up(words(model_folder()), count=1 + STREAMS)
    async with run_server(server, probe, threads=threads, concurrency=2 * STREAMS) as instance:
        async with client_session() as session:
            await asyncio.gather(
                *(
                    send_request(session, instance.url, instance.dialect, request)
                    for request in warm
                )
            )
        return await _disturb(instance, long_prompt)


async def _disturb(instance: RunningServer, long_prompt: int) -> dict[str, Any]:
    rng = random.Random(workload.SEED)  # noqa: S311 - not cryptographic
    all_words = words(model_folder())
    async with client_session() as session:
        streams = [
            asyncio.create_task(
                send_request(session, instance.url, instance.dialect,
                    workload.sized(rng, all_words, 32, STREAM_TOKENS))
            )
            for _ in range(STREAMS)
        ]  # fmt: skip
        await asyncio.sleep(SETTLE_S)
        long = workload.sized(rng, all_words, long_prompt, 8)
        response = await send_request(session, instance.url, instance.dialect, long)
        records = await asyncio.gather(*streams)
    if problems := {r.problem for r in [response, *records]} - {None}:
        raise Unavailable(f"requests failed: {', '.join(map(str, problems))}")
    if any(record.end < response.first_token for record in records):
        raise Unavailable("the streams ended before the long prompt was read")
    start = max(record.first_token for record in records)
    usual = [gap for r in records for gap in gaps(r, start, response.sent)]
    during = [gap for r in records for gap in gaps(r, response.sent, response.first_token)]
    return {
        "streams": STREAMS,
        "long_prompt": long_prompt,
        "prefill_s": response.first_token - response.sent,
        "usual_s": percentile(usual, 50),
        "usual_p99_s": percentile(usual, 99),
        "during_p50_s": percentile(during, 50),
        "during_p99_s": percentile(during, 99),
        "longest_s": max(during, default=math.nan),
    }
