"""`python -m benchmarks.soak`: a long mixed load on both demo models, with a kill every 2 minutes.

Every answer is compared with a reference. It ends with status 1 if one was wrong, hung, or failed
while no process had been killed, if the server did not recover, or if anything of it is left. The
figures go into RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks import machine, report, results
from benchmarks.cache import ROOT, cache, cached, run
from benchmarks.processes import HTTP_WORKER, RANK, ProcessTree, proportional_memory, spawn
from benchmarks.servers.base import environment, executable, free_port
from benchmarks.servers.triptych import store_at
from benchmarks.soak_clients import IMAGES, Clients, text_references

HERE = Path(__file__).resolve().parent
CLIENTS = 12
KILL_EVERY_S = 120.0
RECOVERY_S = 180.0
NOTICE_S = 30.0
SAMPLE_S = 5.0
WARM_S = 60.0
"""Samples before count neither as first nor as last."""
SETTINGS = {
    "TRIPTYCH_TEXT_MODEL": "demo-text",
    "TRIPTYCH_IMAGE_MODEL": "demo-image",
    "TRIPTYCH_NUM_THREADS": "1",
    # Fewer than the clients ask for: sequences are preempted.
    "TRIPTYCH_MAX_KV_TOKENS": "2048",
    "TRIPTYCH_REQUEST_TIMEOUT": "60",
}
GAUGES = ("admitted_sequences", "running_sequences", "waiting_sequences", "kv_tokens_used")
LAUNCHER = "runners.rank.launcher"
KILLS = ((RANK, signal.SIGKILL), (RANK, signal.SIGSTOP), (LAUNCHER, signal.SIGKILL))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the clients' choices")
    args = parser.parse_args()
    figures = asyncio.run(_soak(args.minutes * 60, args.seed))
    data = results.load(HERE / "results.json")
    data["soak"] = figures | {"machine": machine.describe()}
    results.save(data, HERE / "results.json")
    (HERE / "RESULTS.md").write_text(report.render(data))
    print("\n".join(figures["problems"]) or "no problem")
    sys.exit(1 if figures["problems"] else 0)


async def _soak(seconds: float, seed: int) -> dict[str, Any]:
    home = cached("stores/soak", _make_models)
    [folder] = (home / "models" / "demo-text").glob("*/model/config.json")
    references = await asyncio.to_thread(text_references, folder.parent)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        port = free_port()
        variables = store_at(home) | SETTINGS | {"PORT": str(port), "TMPDIR": temporary}
        command = [executable("bentoml"), "serve", ".", "--host", "127.0.0.1"]
        log = cache() / "logs" / "soak.log"
        process = spawn(command, cwd=ROOT, env=environment(variables), log=log)
        tree = ProcessTree(process.pid)
        members: list[psutil.Process] = []
        url = f"http://127.0.0.1:{port}"
        try:
            clients = Clients(url, references, seed)
            async with aiohttp.ClientSession() as session:
                await _ready(session, url)
                for prompt in IMAGES:
                    references.pixels[prompt] = (await clients.image(session, prompt)).astype(int)
                figures = await _load(clients, session, url, tree, seconds)
            members = tree.members()
        finally:
            process.terminate()
            status = await asyncio.to_thread(process.wait, 60)
        _, alive = psutil.wait_procs(members, timeout=5)
        left = [p.name() for p in alive] + sorted(os.listdir(temporary))
        # torch's own empty folder.
        left = [name for name in left if not name.startswith("torchinductor")]
        if status != 0 or left:
            figures["problems"].append(f"exit status {status}, left behind: {left}")
        return figures


async def _load(
    clients: Clients, session: aiohttp.ClientSession, url: str, tree: ProcessTree, seconds: float
) -> dict[str, Any]:
    start = time.monotonic()
    running = asyncio.create_task(clients.run(CLIENTS))
    samples: list[Sample] = []
    sampler = asyncio.create_task(_sample(tree, start, samples))
    recoveries: list[float] = []
    for number in range(int(seconds // KILL_EVERY_S)):
        await asyncio.sleep(start + KILL_EVERY_S * (number + 0.5) - time.monotonic())
        module, sent = KILLS[number % len(KILLS)]
        targets = tree.running(module)
        killed = time.monotonic()
        clients.disturb()
        # The models take turns.
        targets[number // len(KILLS) % len(targets)].send_signal(sent)
        await _not_ready(session, url)
        await _ready(session, url)
        recoveries.append(time.monotonic() - killed)
        clients.calm()
    await asyncio.sleep(max(0.0, start + seconds - time.monotonic()))
    clients.stop.set()
    await running
    sampler.cancel()
    await asyncio.gather(sampler, return_exceptions=True)
    problems = clients.problems
    gauges = await _gauges(session, url)
    if any(gauges.values()):
        problems.append(f"not zero after the last request: {gauges}")
    return {
        "minutes": seconds / 60,
        "counts": dict(clients.counts),
        "kills": len(recoveries),
        "recovery_s": recoveries,
        "problems": problems,
    } | _growth(samples)


Sample = tuple[float, int, int, int]
"""Seconds since the start, and of the HTTP worker memory in bytes, descriptors and threads."""


async def _sample(tree: ProcessTree, start: float, samples: list[Sample]) -> None:
    while True:
        for process in tree.running(HTTP_WORKER):
            memory = await asyncio.to_thread(proportional_memory, process.pid)
            samples.append(
                (time.monotonic() - start, memory, process.num_fds(), process.num_threads())
            )
        await asyncio.sleep(SAMPLE_S)


def _growth(samples: list[Sample]) -> dict[str, Any]:
    """Medians of the first and of the last quarter of the samples."""
    warm = [sample for sample in samples if sample[0] > WARM_S] or samples
    quarter = max(1, len(warm) // 4)
    return {
        name: [statistics.median(s[i] for s in part) for part in (warm[:quarter], warm[-quarter:])]
        for i, name in ((1, "worker_bytes"), (2, "worker_descriptors"), (3, "worker_threads"))
    }


async def _ready(session: aiohttp.ClientSession, url: str) -> None:
    await _wait_for_status(session, url, lambda status: status == 200, RECOVERY_S)


async def _not_ready(session: aiohttp.ClientSession, url: str) -> None:
    """A hung rank is noticed after the heartbeat timeout."""
    await _wait_for_status(session, url, lambda status: status != 200, NOTICE_S)


async def _wait_for_status(
    session: aiohttp.ClientSession, url: str, expected: Callable[[int], bool], patience: float
) -> None:
    deadline = time.monotonic() + patience
    while not expected(await _status(session, url)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"/readyz did not change within {patience:g} s")
        await asyncio.sleep(0.1)


async def _status(session: aiohttp.ClientSession, url: str) -> int:
    try:
        async with session.get(f"{url}/readyz") as response:
            return response.status
    except aiohttp.ClientError:
        return 0


async def _gauges(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What is admitted, running or waiting; all of it is zero within a second."""
    names = tuple(f"triptych_{name}" for name in GAUGES)
    await asyncio.sleep(2)
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {
        name: float(value)
        for line in lines
        if line.startswith(names)
        for name, _, value in [line.rpartition(" ")]
    }


def _make_models(home: Path) -> None:
    command = [executable("python"), "-m", "model_store_scripts.make_demo_models"]
    run(command, cwd=ROOT, env=os.environ | store_at(home))


if __name__ == "__main__":
    main()
