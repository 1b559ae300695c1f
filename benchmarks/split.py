"""Cost of tensor parallelism for a model that fits one process.

Compares two ranks of one thread each with one process of two threads, on the same weights and
cores, and measures the time to send a step to the other rank.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import workload
from benchmarks.client import run_closed_loop
from benchmarks.metrics import summarise
from benchmarks.model import even_model_folder, words
from benchmarks.servers.base import Server, run_server
from benchmarks.servers.triptych import Triptych

TWO: dict[str, Any] = {
    "model": even_model_folder,
    "engine": "deepspeed",
    "tensor_parallel": 2,
}
SIDES: dict[str, tuple[Server, int]] = {
    "one process": (Triptych("whole", model=even_model_folder), 2),
    "two ranks, gloo": (Triptych("split-gloo", **TWO), 1),
    "two ranks, shared memory": (Triptych("split-shm", **TWO, shm_collectives=True), 1),
}
"""The server, and the threads of each of its ranks."""
REPEATS = 2000


def measure(concurrencies: Sequence[int], rounds: int, *, extra: int = 8) -> dict[str, Any]:
    """Tokens per second of each side by round, and microseconds per batch. Raises: Unavailable."""
    for server, _ in SIDES.values():
        server.prepare()
    cells = []
    for number in range(1, rounds + 1):
        for name, (server, threads) in SIDES.items():
            for cell in asyncio.run(_side(server, threads, concurrencies, extra)):
                print(f"split {name} at {cell['load']}: {cell['tokens_per_second']:.1f} tok/s")
                cells.append({"side": name, "round": number, **cell})
    return {"cells": cells, "control": control()}


async def _side(
    server: Server, threads: int, concurrencies: Sequence[int], extra: int
) -> list[dict[str, Any]]:
    probe, *warm = workload.warm_up(words(even_model_folder()), count=5)
    max_clients = max(concurrencies)
    cells = []
    async with run_server(server, probe, threads=threads, concurrency=max_clients) as instance:
        await run_closed_loop(
            instance.url, instance.dialect, warm, concurrency=4, tree=instance.tree
        )
        for clients in concurrencies:
            requests = workload.closed_loop(
                words(even_model_folder()), concurrency=clients, count=clients + extra
            )
            outcome = await run_closed_loop(
                instance.url, instance.dialect, requests, concurrency=clients, tree=instance.tree
            )
            cells.append({"load": clients, **asdict(summarise(*outcome))})
    return cells


def control(repeats: int = REPEATS) -> dict[str, float]:
    """Median round trips in microseconds: a batch is sent to the other rank, which acknowledges it.

    Measured for 16 decoding sequences, for the same with a prompt chunk of 512 tokens, for 16
    sequences as a pickled object, and for the acknowledgement alone.
    """
    from torch.multiprocessing import get_context

    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = spawn.SimpleQueue()
        ranks = [
            spawn.Process(target=_rank, args=(rank, folder, repeats, results)) for rank in (0, 1)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return dict(results.get())


def _rank(rank: int, folder: str, repeats: int, results: Any) -> None:
    import torch.distributed as dist

    from runners.text.lockstep import TPGroup
    from runners.text.paging.batch import Batch

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    group = TPGroup()
    decode = Batch([[7]] * 16, [200] * 16, [array("i", range(7))] * 16, [True] * 16)
    mixed = Batch(
        [*decode.tokens, [7] * 512],
        [*decode.past, 0],
        [*decode.block_tables, array("i", [0] * 16)],
        [*decode.wanted, False],
    )

    def send_batch(batch: Batch) -> None:
        if rank == 0:
            group.send(batch)
        else:
            group.receive()

    def send_pickled() -> None:
        box: list[Any] = [decode if rank == 0 else None]
        dist.broadcast_object_list(box)

    round_trips = {
        "decode_us": _round_trip(lambda: send_batch(decode), group, repeats),
        "mixed_us": _round_trip(lambda: send_batch(mixed), group, repeats),
        "pickled_us": _round_trip(send_pickled, group, repeats),
        "acknowledgement_us": _round_trip(lambda: None, group, repeats),
    }
    if rank == 0:
        results.put(round_trips)
    dist.destroy_process_group()


def _round_trip(send: Callable[[], None], group: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        send()
        group.all_reduce_min(1)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
