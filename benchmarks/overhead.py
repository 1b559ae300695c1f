"""Serving overhead: the engine called in-process against the same requests over HTTP."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.client import run_closed_loop
from benchmarks.isolated import arguments, run_isolated
from benchmarks.metrics import Record, Window, summarise
from benchmarks.model import model_folder, words
from benchmarks.processes import CpuClock, ProcessTree
from benchmarks.servers.base import run_server
from benchmarks.servers.triptych import Triptych

EXTRA = 16
"""Maximum number of requests beyond one per client."""


def measure(
    threads: int, concurrencies: Sequence[int], rounds: int, *, extra: int = EXTRA
) -> list[dict[str, Any]]:
    """One entry per concurrency and round: tokens per second of both. Raises: Unavailable."""
    server = Triptych("triptych")
    server.prepare()
    entries = []
    for number in range(1, rounds + 1):
        for clients in concurrencies:
            engine = run_isolated(__name__, threads, concurrency=clients, extra=extra)
            http = asyncio.run(_over_http(server, threads, clients, extra))
            entry = {"round": number, "concurrency": clients, "engine": engine, "http": http}
            speeds = f"engine {engine['tokens_per_second']:.1f}, HTTP "
            print(f"overhead {clients:4}: {speeds}{http['tokens_per_second']:.1f} tok/s")
            entries.append(entry)
    return entries


def requests(clients: int, extra: int) -> list[workload.Request]:
    """The requests, the same for both sides."""
    count = clients + min(extra, clients + 4)
    return workload.closed_loop(words(model_folder()), concurrency=clients, count=count)


async def _over_http(server: Triptych, threads: int, clients: int, extra: int) -> dict[str, Any]:
    probe, *warm = workload.warm_up(words(model_folder()), count=5)
    async with run_server(server, probe, threads=threads, concurrency=clients) as instance:
        await run_closed_loop(
            instance.url, instance.dialect, warm, concurrency=4, tree=instance.tree
        )
        records, window = await run_closed_loop(
            instance.url,
            instance.dialect,
            requests(clients, extra),
            concurrency=clients,
            tree=instance.tree,
        )
    return asdict(summarise(records, window))


class InProcess:
    """A rank's program, called in this process as `runners.rank.worker` calls it."""

    def __init__(
        self, clients: int, threads: int, work_dir: Path, *, engine: str = "accelerate"
    ) -> None:
        from runners import TEXT_PROGRAMS
        from runners.config.model import validate
        from runners.rank.program import RankContext

        config = validate(
            {
                "engine": engine,
                "name": "bench",
                "model_path": model_folder(),
                "max_batch_size": clients,
                "num_threads": threads,
            }
        )
        module, _, function = TEXT_PROGRAMS[engine].partition(":")
        load_program = getattr(importlib.import_module(module), function)
        self._records: dict[str, Record] = {}
        self._queue: list[workload.Request] = []
        self._finished = 0
        self._tree = ProcessTree(os.getpid())
        self._start = (0.0, CpuClock.read(self._tree))
        self._windows: list[Window] = []
        self._program = load_program(
            RankContext(
                config=config,
                rank=0,
                num_threads=threads,
                work_dir=work_dir,
                emit=self._receive,
            )
        )

    def run(
        self, requests: Sequence[workload.Request], clients: int
    ) -> tuple[list[Record], Window]:
        """Run the requests as `client.run_closed_loop` does."""
        self._records, self._queue, self._finished = {}, list(reversed(requests)), 0
        self._start, self._windows = (time.monotonic(), CpuClock.read(self._tree)), []
        for _ in range(clients):
            self._submit()
        while self._finished < len(requests):
            self._program.step()
        return list(self._records.values()), self._windows[0]

    def _submit(self) -> None:
        from runners.contracts.text import GenerationRequest, SamplingParams
        from runners.protocol.messages import Submit

        if not self._queue:
            start, cpu = self._start
            usage = CpuClock.read(self._tree) - cpu
            # This process is both server and client, so its CPU time was subtracted twice.
            others = usage.others + usage.server
            self._windows.append(Window(start, time.monotonic(), usage.server, others))
            return
        request = self._queue.pop()
        name = f"request-{len(self._records)}"
        sampling = SamplingParams(
            max_new_tokens=request.output_tokens, temperature=0.0, ignore_eos=True
        )
        self._records[name] = Record(
            request.prompt_tokens, request.output_tokens, sent=time.monotonic()
        )
        self._program.receive(
            Submit(GenerationRequest(request_id=name, prompt=request.prompt, sampling=sampling))
        )

    def _receive(self, message: Any) -> None:
        from runners.protocol.messages import Accepted, Events, Failed

        now = time.monotonic()
        match message:
            case Accepted(name, prompt_tokens):
                self._records[name].counted_prompt = prompt_tokens
            case Failed(name, error, reason):
                self._records[name].error = f"{error}: {reason}"
                self._finish()
            case Events(events):
                deltas: list[Any] = list(events)
                for delta in deltas:
                    record = self._records[delta.request_id]
                    record.events.append(now)
                    record.tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        record.end = now
                        self._finish()

    def _finish(self) -> None:
        self._finished += 1
        self._submit()


def main() -> None:
    """Measure the engine, in the new process, and print the summary as JSON."""
    args = arguments()
    clients = args["concurrency"]
    with tempfile.TemporaryDirectory() as work_dir:
        engine = InProcess(clients, args["threads"], Path(work_dir))
        engine.run(workload.warm_up(words(model_folder()), count=4), 4)
        records, window = engine.run(requests(clients, args["extra"]), clients)
    print(json.dumps(asdict(summarise(records, window))))


if __name__ == "__main__":
    main()
