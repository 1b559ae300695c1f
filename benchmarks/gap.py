"""How much a long prompt disturbs running streams: their longest gap between two tokens."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from benchmarks import workload
from benchmarks.cache import Unavailable
from benchmarks.client import ask, client_session
from benchmarks.metrics import gaps, percentile
from benchmarks.model import model_folder, words
from benchmarks.servers.base import Running, running
from benchmarks.servers.triptych import Triptych

STREAMS = 8
STREAM_TOKENS = 400
LONG_PROMPT = 4000
SETTLE_S = 4.0
"""Undisturbed streaming before the long prompt comes."""


def measure(threads: int, *, long_prompt: int = LONG_PROMPT) -> dict[str, Any]:
    """Gaps in seconds, before and during the long prompt's prefill. Raises: Unavailable."""
    server = Triptych("triptych")
    server.prepare()
    return asyncio.run(_measure(server, threads, long_prompt))


async def _measure(server: Triptych, threads: int, long_prompt: int) -> dict[str, Any]:
    probe, *warm = workload.warm_up(words(model_folder()), count=1 + STREAMS)
    async with running(server, probe, threads=threads, concurrency=2 * STREAMS) as up:
        async with client_session() as session:
            await asyncio.gather(*(ask(session, up.url, up.dialect, each) for each in warm))
        return await _disturb(up, long_prompt)


async def _disturb(up: Running, long_prompt: int) -> dict[str, Any]:
    rng = random.Random(workload.SEED)  # noqa: S311 - a workload is no secret
    all_words = words(model_folder())
    async with client_session() as session:
        streams = [
            asyncio.create_task(
                ask(session, up.url, up.dialect,
                    workload.sized(rng, all_words, 32, STREAM_TOKENS))
            )
            for _ in range(STREAMS)
        ]  # fmt: skip
        await asyncio.sleep(SETTLE_S)
        long = workload.sized(rng, all_words, long_prompt, 8)
        answer = await ask(session, up.url, up.dialect, long)
        records = await asyncio.gather(*streams)
    if problems := {r.problem for r in [answer, *records]} - {None}:
        raise Unavailable(f"requests failed: {', '.join(map(str, problems))}")
    if any(record.end < answer.first_token for record in records):
        raise Unavailable("the streams ended before the long prompt was read")
    started = max(record.first_token for record in records)
    usual = [gap for r in records for gap in gaps(r, started, answer.sent)]
    during = [gap for r in records for gap in gaps(r, answer.sent, answer.first_token)]
    return {
        "streams": STREAMS,
        "long_prompt": long_prompt,
        "prefill_s": answer.first_token - answer.sent,
        "usual_s": percentile(usual, 50),
        "usual_p99_s": percentile(usual, 99),
        "during_p50_s": percentile(during, 50),
        "during_p99_s": percentile(during, 99),
        "longest_s": max(during, default=math.nan),
    }
