"""Renders RESULTS.md from results.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks import limit
from benchmarks.gpu_check import report as gpu_report
from benchmarks.metrics import spread
from benchmarks.results import Cell, Results, loads, servers, values
from benchmarks.sections import row_text, sections, spread_text, table_text
from benchmarks.servers import TRIPTYCH_SERVERS, weight_bits

PER_ROUND = "median (lowest - highest round)"
DISTURBED = 0.1
"""CPU cores used by other processes, above which the report names the cell."""


def render(results: Results) -> str:
    """The whole report in Markdown."""
    parts = [
        "# Results",
        "Written by `make bench`. [README.md](README.md) describes the measurements.",
        _machine(results.get("machine", {})),
        *(_wall(results) if servers(results, "wall") else ()),
        *(_cpu(results) if servers(results, "cpu") else ()),
        *sections(results),
        _remarks(results),
        gpu_report.section(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    return (
        f"**Machine:** {machine['cores']} cores of {machine['cpu']} ({', '.join(machine['isa'])}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB memory, copying at "
        f"{machine['copy_bytes_per_second'] / 1e9:.1f} GB/s (read and written). "
        f"**Software:** Triptych {machine['commit']}, Python {machine['python']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}."
    )


def _wall(results: Results) -> list[str]:
    clients = loads(results, "wall")
    names = servers(results, "wall")
    threads = next(c["threads"] for c in results["cells"] if c["table"] == "wall")

    def speed(name: str, load: Any) -> str:
        where = {"table": "wall", "server": name, "load": load}
        return spread_text(values(results, "tokens_per_second", **where), 1)

    return [
        f"## Output tokens per second, {threads} threads, by concurrent clients\n\n"
        + table_text(["server", *clients], [[n, *(speed(n, c) for c in clients)] for n in names])
        + _limit_row(results, clients)
        + f"\n\nEach is the {PER_ROUND}.",
        _ratios(results, "wall", "tokens_per_second", clients),
        "![tokens per second and time to first token](results.svg)",
        _latency(results, names, [*clients, "poisson"]),
        _resources(results, names),
    ]


def _limit_row(results: Results, clients: Sequence[int]) -> str:
    """Two more rows: the limit of this machine, and Triptych's share of it."""
    if "limit" not in results:
        return ""
    bound, share = ["*limit*"], ["*triptych / limit*"]
    for count in clients:
        cells = [
            c
            for c in results["cells"]
            if (c["table"], c["server"], c["load"]) == ("wall", "triptych", count)
            and c.get("tokens")
        ]
        limits = [_limit(results, c) for c in cells]
        bound.append(spread_text(limits, 1))
        share.append(
            spread_text(
                [c["tokens_per_second"] / top for c, top in zip(cells, limits, strict=True)], 2
            )
        )
    return "\n" + "\n".join(row_text(row) for row in (bound, share))


def _limit(results: Results, cell: Cell) -> float:
    """The limit for the prompt and output tokens of the cell's window."""
    times = results["limit"]
    if str(cell["load"]) not in times["t_decode"]:
        return math.nan
    return limit.tokens_per_second(times, cell["load"], cell["prompt_tokens"], cell["tokens"])


def _ratios(results: Results, table: str, field: str, clients: Sequence[Any]) -> str:
    """Triptych divided by each peer of the same precision, by round."""
    rows = []
    for server in TRIPTYCH_SERVERS:
        for peer in servers(results, table):
            if peer in TRIPTYCH_SERVERS or weight_bits(peer) != weight_bits(server):
                continue
            cells = [_ratio(results, table, field, server, peer, count) for count in clients]
            if any(cells):
                rows.append([f"{server} / {peer}", *cells])
    if not rows:
        return ""
    return f"### Triptych relative to each peer\n\n{table_text(['', *clients], rows)}"


def _ratio(results: Results, table: str, field: str, server: str, peer: str, load: Any) -> str:
    numerators, denominators = (
        values(results, field, table=table, server=name, load=load) for name in (server, peer)
    )
    ratios = [a / b for a, b in zip(numerators, denominators, strict=False) if b]
    return spread_text(ratios, 2)


def _latency(results: Results, names: Sequence[str], clients: Sequence[Any]) -> str:
    def cell(name: str, load: Any) -> str:
        where = {"table": "wall", "server": name, "load": load}
        ttft_p50, ttft_p95, tpot_p50 = (
            spread(values(results, field, **where))[0]
            for field in ("ttft_p50", "ttft_p95", "tpot_p50")
        )
        measured = not math.isnan(ttft_p50)
        return f"{ttft_p50:.2f} / {ttft_p95:.2f} / {tpot_p50 * 1000:.0f}" if measured else ""

    rows = [[name, *(cell(name, load) for load in clients)] for name in names]
    return (
        "## Time to first token in s, p50 / p95, and time per further token in ms, p50\n\n"
        + table_text(["server", *clients], rows)
        + "\n\nEach is the median of the rounds. `static` does not stream: all its tokens "
        "arrive together."
    )


def _resources(results: Results, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        matches = [
            c
            for c in results["cells"]
            if c["table"] == "wall" and c["server"] == name and "skipped" not in c
        ]
        rows.append(
            [
                name,
                results.get("versions", {}).get(name, ""),
                spread_text(sorted({c["startup_s"] for c in matches}), 1),
                f"{max((c['peak_bytes'] for c in matches), default=0) / 2**20:.0f}",
            ]
        )
    head = ["server", "version", "start to first response, s", "peak memory, MiB"]
    return f"## Start and memory\n\n{table_text(head, rows)}"


def _cpu(results: Results) -> list[str]:
    clients = loads(results, "cpu")
    rows = []
    for name in servers(results, "cpu"):
        row = [name]
        for count in clients:
            where = {"table": "cpu", "server": name, "load": count}
            row.append(spread_text(values(results, "tokens_per_cpu_second", **where), 1))
            row.append(spread_text(values(results, "tokens_per_second", **where), 1))
        rows.append(row)
    head = ["server"]
    for count in clients:
        head += [f"tokens per CPU second, {count} clients", f"tokens per second, {count} clients"]
    return [
        "## Output tokens per CPU second, one thread\n\n" + table_text(head, rows),
        _ratios(results, "cpu", "tokens_per_cpu_second", clients),
    ]


def _remarks(results: Results) -> str:
    """Failures, skipped cells and disturbances."""
    remarks = [
        f"`{name}` is missing: {reason}" for name, reason in results.get("unavailable", {}).items()
    ]
    for cell in results.get("cells", []):
        name = f"`{cell['server']}` at {cell['load']} ({cell['table']}, round {cell['round']})"
        if "skipped" in cell:
            remarks.append(f"{name} was skipped: {cell['skipped']}")
        elif cell["failed"]:
            problems = "; ".join(cell["problems"])
            remarks.append(f"{name}: {cell['failed']} of {cell['requests']} failed: {problems}")
        remarks += _disturbed(name, cell)
    for entry in results.get("overhead", []):
        for side in ("engine", "http"):
            name = f"`{side}` at {entry['concurrency']} (overhead, round {entry['round']})"
            remarks += _disturbed(name, entry[side])
    for name, reason in results.get("failed", {}).items():
        remarks.append(f"the {name} measurement failed: {reason}")
    if not remarks:
        return "No request failed and nothing was skipped."
    return "## Remarks\n\n" + "\n".join(f"- {line}" for line in remarks)


def _disturbed(name: str, cell: Cell) -> list[str]:
    busy = cell.get("disturbance") or 0
    return [f"{name}: other processes used {busy:.2f} cores meanwhile"] if busy > DISTURBED else []
