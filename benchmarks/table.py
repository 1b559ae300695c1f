"""The table: every server under the same loads, one server at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import workload
from benchmarks.cache import Unavailable
from benchmarks.client import run_closed_loop, run_poisson
from benchmarks.metrics import Record, Window, summarise
from benchmarks.model import model_folder, words
from benchmarks.processes import peak_memory
from benchmarks.results import Cell, Results, replace_cells, values
from benchmarks.servers.base import RunningServer, Server, run_server

LONGEST_CELL_S = 150.0


@dataclass(frozen=True)
class Plan:
    """The servers to measure, and the loads."""

    servers: Sequence[Server]
    concurrencies: Sequence[int] = (1, 4, 16, 32)
    rounds: int = 2
    threads: int = 2
    per_client: float = 1.75
    extra: int = 4
    """A closed loop has `per_client` requests per client, plus `extra`."""
    cpu_concurrency: int | None = 16
    """Clients of the table with one thread; None omits that table."""
    poisson_rate: float = 0.5
    """Requests per second of the Poisson load, which is measured in the first round only."""
    poisson_count: int = 20

    def requests(self, clients: int) -> list[workload.Request]:
        """The requests for a number of clients, the same for every server."""
        count = workload.request_count(clients, per_client=self.per_client, extra=self.extra)
        return workload.closed_loop(words(model_folder()), concurrency=clients, count=count)


QUICK: dict[str, Any] = {
    "concurrencies": (1, 4),
    "rounds": 1,
    "per_client": 1.0,
    "extra": 2,
    "cpu_concurrency": 4,
    "poisson_rate": 1.0,
    "poisson_count": 4,
}


def measure(plan: Plan, results: Results, save: Callable[[], None]) -> None:
    """Add the cells to the results and save after each server; one that fails is `unavailable`."""
    replace_cells(results, [server.name for server in plan.servers])
    available = [server for server in plan.servers if _prepare(server, results)]
    for number in range(1, plan.rounds + 1):
        for server in available:
            if server.name not in results["unavailable"]:
                _round(plan, server, number, results)
                save()


def _prepare(server: Server, results: Results) -> bool:
    try:
        results["versions"][server.name] = server.prepare()
    except Unavailable as error:
        _mark_unavailable(server, error, results)
        return False
    return True


def _mark_unavailable(server: Server, error: Unavailable, results: Results) -> None:
    print(f"{server.name}: unavailable: {error}", flush=True)
    results["unavailable"][server.name] = str(error)


def _round(plan: Plan, server: Server, number: int, results: Results) -> None:
    try:
        asyncio.run(_wall(plan, server, number, results))
        if number == 1 and plan.cpu_concurrency is not None:
            asyncio.run(_cpu(plan, server, plan.cpu_concurrency, results))
    except Unavailable as error:
        _mark_unavailable(server, error, results)


async def _wall(plan: Plan, server: Server, number: int, results: Results) -> None:
    """Measure all loads with all threads."""
    where: Cell = {"table": "wall", "server": server.name, "round": number}
    probe, *warm = workload.warm_up(words(model_folder()), count=5)
    max_clients = max(plan.concurrencies)
    async with (
        run_server(server, probe, threads=plan.threads, concurrency=max_clients) as instance,
        peak_memory(instance.tree) as peak,
    ):
        where |= {"startup_s": instance.startup_s, "threads": plan.threads}
        await _closed(instance, warm, len(warm))
        for clients in sorted(plan.concurrencies):
            requests = plan.requests(clients)
            if (reason := _too_long(plan, results, where, clients, requests)) is not None:
                _add_cell(results, where | {"load": clients, "skipped": reason})
                continue
            records, window = await _closed(instance, requests, clients)
            _add_cell(results, _cell(where, clients, records, window, peak[0]))
        if number == 1 and plan.poisson_count:
            requests = workload.poisson(
                words(model_folder()), rate=plan.poisson_rate, count=plan.poisson_count
            )
            outcome = await run_poisson(
                instance.url, instance.dialect, requests, tree=instance.tree
            )
            _add_cell(results, _cell(where, "poisson", *outcome, peak[0]))


async def _cpu(plan: Plan, server: Server, clients: int, results: Results) -> None:
    """Measure one load on one thread, for tokens per CPU second."""
    where: Cell = {"table": "cpu", "server": server.name, "round": 1, "threads": 1}
    probe, *warm = workload.warm_up(words(model_folder()), count=5)
    # The same number of clients, but fewer requests: one thread is slower.
    requests = plan.requests(clients)[: clients + clients // 2]
    async with (
        run_server(server, probe, threads=1, concurrency=clients) as instance,
        peak_memory(instance.tree) as peak,
    ):
        await _closed(instance, warm, len(warm))
        records, window = await _closed(instance, requests, clients)
        _add_cell(results, _cell(where, clients, records, window, peak[0]))


async def _closed(
    instance: RunningServer, requests: Sequence[workload.Request], clients: int
) -> tuple[list[Record], Window]:
    return await run_closed_loop(
        instance.url, instance.dialect, requests, concurrency=clients, tree=instance.tree
    )


def _too_long(
    plan: Plan, results: Results, where: Cell, clients: int, requests: list[workload.Request]
) -> str | None:
    """Why the highest load is skipped for a slow server, judged by its speed at the load before."""
    lower = [c for c in sorted(plan.concurrencies) if c < clients]
    if clients != max(plan.concurrencies) or not lower:
        return None
    (speed,) = values(results, "tokens_per_second", **where, load=lower[-1])
    if not speed > 0:
        return None
    expected = sum(r.output_tokens for r in requests) / speed
    return f"would take {expected:.0f} s" if expected > LONGEST_CELL_S else None


def _cell(
    where: Cell, load: int | str, records: list[Record], window: Window, peak_bytes: int
) -> Cell:
    return where | {"load": load, "peak_bytes": peak_bytes} | asdict(summarise(records, window))


def _add_cell(results: Results, cell: Cell) -> None:
    results["cells"].append(cell)
    outcome = cell.get("skipped") or (
        f"{cell['tokens_per_second']:7.1f} tok/s, {cell['failed']} of {cell['requests']} failed "
        f"in {cell['seconds']:.1f} s"
    )
    print(f"{cell['table']:4} {cell['server']:16} {cell['load']:>7}  {outcome}", flush=True)
