"""Part g: from the start of a rank to its first token, and the time to first token under load.

The model is that of part c, as a folder that is in the page cache.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median

from benchmarks.gpu_check.models import large_model_folder
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.rates import Round
from benchmarks.gpu_check.serving import Answer, Served, serving
from benchmarks.gpu_check.throughput import prompts_of
from benchmarks.metrics import percentile

READY_BAR_S = 30.0
STREAMS, PROBES, PROMPT, LONG_PROMPT = 64, 10, 128, 4096


def run(check: Context) -> None:
    """Start the runner on the large model, and measure."""
    folder = large_model_folder(check.device, check.folder)
    check.device.release()
    read(folder)
    asyncio.run(_measure(check, folder))


def read(folder: Path) -> None:
    """Read all weights, so that they are in the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


async def _measure(check: Context, folder: Path) -> None:
    device, record = check.device, check.record
    streams, probes, prompt, long = device.pick(
        (STREAMS, PROBES, PROMPT, LONG_PROMPT), (2, 2, 16, 64)
    )
    async with serving(
        device,
        folder,
        engine="accelerate",
        max_batch_size=2 * streams,
        max_kv_tokens=device.pick(128 * 1024, 1024),
    ) as served:
        record.bar("ready from a warm page cache", served.start_s, maximum=READY_BAR_S, unit="s")
        for name, length in (("idle", prompt), (f"idle, prompt of {long}", long)):
            answers = [await served.generate(p, 2) for p in prompts_of(probes + 1, length, length)]
            times = spread([a.first_token for a in answers[1:]])
            record.figure(f"ttft_s {name}", times)
            record.headline(f"time to first token, {name}: {1000 * times['p50']:.0f} ms")
        await _under_load(check, served, streams, probes, prompt)


async def _under_load(
    check: Context, served: Served, streams: int, probes: int, prompt: int
) -> None:
    """Probes, one after another, while streams decode; then all streams as one round."""
    count = check.device.pick(512, 24)
    load = asyncio.ensure_future(served.generate_all(prompts_of(streams, prompt, 7), count))
    await asyncio.sleep(check.device.pick(2.0, 0.05))
    answers = [await served.generate(p, 2) for p in prompts_of(probes, prompt, 8)]
    complete = load.done()
    results = await load
    name = f"ttft_s under load of {streams}"
    if complete:
        check.record.skip(name, "the load ended before the last probe")
    else:
        times = spread([a.first_token for a in answers])
        check.record.figure(name, times)
        text = f"{1000 * times['p50']:.0f} ms"
        check.record.headline(f"time to first token under a load of {streams}: {text}")
    tokens = [len(answer.tokens) for answer in results]
    check.record.check("all streams complete", tokens == [count] * streams)
    results = await served.generate_all(prompts_of(streams, prompt, 9), count)
    rate = Round(results[0].sent, [answer.times for answer in results])
    check.record.figure(f"tokens_per_second {streams} through the runner", rate.total_rate)
    check.record.figure("longest gap_s", max(map(longest_gap, results)))


def longest_gap(answer: Answer) -> float:
    """Seconds between two consecutive tokens of a stream, at most."""
    return max((b - a for a, b in zip(answer.times, answer.times[1:], strict=False)), default=0.0)


def spread(values: list[float]) -> dict[str, float]:
    """Median and the 95th percentile."""
    return {"p50": median(values), "p95": percentile(values, 95)}
