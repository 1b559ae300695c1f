"""Renders RESULTS.md from results.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import limit
from benchmarks.metrics import spread
from benchmarks.results import Cell, Results, loads, servers, values
from benchmarks.servers import TRIPTYCH_SERVERS, weight_bits
from benchmarks.workload import OUTPUT_TOKENS, PROMPT_TOKENS

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
        *_others(results),
        _remarks(results),
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
        return _spread(values(results, "tokens_per_second", **where), 1)

    return [
        f"## Output tokens per second, {threads} threads, by concurrent clients\n\n"
        + _table(["server", *clients], [[n, *(speed(n, c) for c in clients)] for n in names])
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
        bound.append(_spread(limits, 1))
        share.append(
            _spread([c["tokens_per_second"] / top for c, top in zip(cells, limits, strict=True)], 2)
        )
    return "\n" + "\n".join(_row(row) for row in (bound, share))


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
    return f"### Triptych relative to each peer\n\n{_table(['', *clients], rows)}"


def _ratio(results: Results, table: str, field: str, server: str, peer: str, load: Any) -> str:
    numerators, denominators = (
        values(results, field, table=table, server=name, load=load) for name in (server, peer)
    )
    ratios = [a / b for a, b in zip(numerators, denominators, strict=False) if b]
    return _spread(ratios, 2)


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
        + _table(["server", *clients], rows)
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
                _spread(sorted({c["startup_s"] for c in matches}), 1),
                f"{max((c['peak_bytes'] for c in matches), default=0) / 2**20:.0f}",
            ]
        )
    head = ["server", "version", "start to first response, s", "peak memory, MiB"]
    return f"## Start and memory\n\n{_table(head, rows)}"


def _cpu(results: Results) -> list[str]:
    clients = loads(results, "cpu")
    rows = []
    for name in servers(results, "cpu"):
        row = [name]
        for count in clients:
            where = {"table": "cpu", "server": name, "load": count}
            row.append(_spread(values(results, "tokens_per_cpu_second", **where), 1))
            row.append(_spread(values(results, "tokens_per_second", **where), 1))
        rows.append(row)
    head = ["server"]
    for count in clients:
        head += [f"tokens per CPU second, {count} clients", f"tokens per second, {count} clients"]
    return [
        "## Output tokens per CPU second, one thread\n\n" + _table(head, rows),
        _ratios(results, "cpu", "tokens_per_cpu_second", clients),
    ]


def _limit_table(times: dict[str, Any]) -> str:
    prompt, output = (sum(bounds) / 2 for bounds in (PROMPT_TOKENS, OUTPUT_TOKENS))
    rows = [
        [
            count,
            f"{seconds * 1000:.1f}",
            f"{limit.tokens_per_second(times, int(count), prompt, output):.1f}",
        ]
        for count, seconds in times["t_decode"].items()
    ]
    head = ["sequences", "one decode step, ms", "*limit*, tokens/s"]
    return (
        "## The limit\n\n"
        f"A prompt token takes {times['t_prefill'] * 1000:.2f} ms.\n\n{_table(head, rows)}\n\n"
        "Here for the workload's mean request; in the first table for the tokens of each cell."
    )


def _others(results: Results) -> Iterable[str]:
    if "limit" in results:
        yield _limit_table(results["limit"])
    if entries := results.get("overhead"):
        rows = []
        for clients in sorted({e["concurrency"] for e in entries}):
            matches = [e for e in entries if e["concurrency"] == clients]
            http, engine = (
                [e[side]["tokens_per_second"] for e in matches] for side in ("http", "engine")
            )
            share = [a / b for a, b in zip(http, engine, strict=True)]
            rows.append([clients, _spread(http, 1), _spread(engine, 1), _spread(share, 3)])
        head = ["clients", "over HTTP, tokens/s", "engine alone, tokens/s", "HTTP / engine"]
        yield f"## Serving overhead\n\n{_table(head, rows)}"
    if entries := results.get("mii"):
        yield _mii(entries)
    if gap := results.get("gap"):
        yield _gap(gap)
    if memory := results.get("memory"):
        yield _memory(memory)
    if quality := results.get("quality"):
        yield _quality(quality)
    if images := results.get("images"):
        yield _images(images)
    if split := results.get("split"):
        yield _split(split)


def _mii(entries: list[dict[str, Any]]) -> str:
    rows = []
    for clients in sorted({e["concurrency"] for e in entries}):
        matches = [e for e in entries if e["concurrency"] == clients]
        triptych, stock = ([e[side] for e in matches] for side in ("ours", "stock"))
        ratio = [a / b for a, b in zip(triptych, stock, strict=True)]
        rows.append([clients, _spread(triptych, 1), _spread(stock, 1), _spread(ratio, 2)])
    head = [
        "sequences",
        "Triptych pipeline mode, tokens/s",
        "stock MIIPipeline, tokens/s",
        "ratio",
    ]
    return (
        "## DeepSpeed-MII\n\n"
        f"The same batches of requests on the same engine.\n\n{_table(head, rows)}"
    )


def _gap(gap: dict[str, Any]) -> str:
    usual = gap["usual_s"]
    median, p99, longest = (
        gap[name] / usual for name in ("during_p50_s", "during_p99_s", "longest_s")
    )
    return (
        "## Effect of a long prompt on running streams\n\n"
        f"{gap['streams']} streams, each with a token every {usual * 1000:.0f} ms; then a prompt "
        f"of {gap['long_prompt']:,} tokens, whose prefill takes {gap['prefill_s']:.1f} s. During "
        "the prefill the longest gap between two tokens of a stream is "
        f"{gap['longest_s'] * 1000:.0f} ms, **{longest:.1f} times** the usual one "
        f"(p99: {p99:.1f} times, median: {median:.1f} times)."
    )


def _quality(quality: dict[str, Any]) -> str:
    return (
        "## Accuracy of 8-bit weights\n\n"
        f"The demo model on {quality['tokens']:,} tokens of held-out chats: float32 and int8 agree "
        f"on the most likely token for **{quality['agreement']:.2%}** of them; mean KL divergence "
        f"{quality['divergence']:.1e} nats, perplexity {quality['perplexity']:.4f} in float32 and "
        f"{quality['perplexity_int8']:.4f} in int8."
    )


def _images(entries: Sequence[dict[str, Any]]) -> str:
    def rates(server: str, clients: int, field: str = "rate") -> list[float]:
        return [e[field] for e in entries if (e["server"], e["concurrency"]) == (server, clients)]

    counts = sorted({e["concurrency"] for e in entries})
    rows: list[list[object]] = [
        [name, *(_spread(rates(name, count), 2) for count in counts)]
        for name in dict.fromkeys(e["server"] for e in entries)
    ]
    ratios = [
        [a / b for a, b in zip(rates("triptych", n), rates("diffusers", n), strict=True)]
        for n in counts
    ]
    rows.append(["*triptych / diffusers*", *(_spread(ratio, 2) for ratio in ratios)])
    batch = [
        four / one
        for four, one in zip(
            rates("triptych", counts[-1], "seconds_per_batch"),
            rates("triptych", counts[0], "seconds_per_batch"),
            strict=True,
        )
    ]
    failed = sum(e["failed"] for e in entries)
    return (
        "## Images per second, by concurrent clients\n\n"
        + _table(["server", *counts], rows)
        + f"\n\nFour concurrent images take **{_spread(batch, 2)}** of the time of four sequential "
        f"ones. {failed} failed."
    )


def _split(split: dict[str, Any]) -> str:
    sides = list(dict.fromkeys(c["side"] for c in split["cells"]))
    loads = sorted({c["load"] for c in split["cells"]})

    def speeds(side: str, load: int) -> list[float]:
        matches = [c for c in split["cells"] if (c["side"], c["load"]) == (side, load)]
        return [c["tokens_per_second"] for c in matches]

    def cells(side: str, load: int) -> list[str]:
        split_speeds, baseline = speeds(side, load), speeds(sides[0], load)
        share = [a / b for a, b in zip(split_speeds, baseline, strict=True)]
        return [_spread(split_speeds, 1), _spread(share, 2)]

    head = [
        "side",
        *(x for n in loads for x in (f"tokens/s, {n} clients", "relative to one process")),
    ]
    rows = [[side, *(x for n in loads for x in cells(side, n))] for side in sides]
    control = split["control"]
    return (
        "## Cost of tensor parallelism\n\n"
        "Two ranks of one thread each, against one process with two threads.\n\n"
        f"{_table(head, rows)}\n\n"
        "Sending a step's plan to the other rank and receiving its acknowledgement takes "
        f"**{control['decode_us']:.0f} µs** for 16 decoding sequences and "
        f"{control['mixed_us']:.0f} µs with 512 more prompt tokens; the acknowledgement alone "
        f"takes {control['acknowledgement_us']:.0f} µs, the decoding plan as a pickled object "
        f"{control['pickled_us']:.0f} µs."
    )


def _memory(memory: dict[str, Any]) -> str:
    mebibyte = 2**20
    return (
        "## Memory of a full queue\n\n"
        f"{memory['requests']} concurrent requests with a KV cache of {memory['kv_tokens']:,} "
        f"tokens ({memory['kv_bound_bytes'] / mebibyte:.0f} MiB): {len(memory['failed'])} failed. "
        f"The rank's memory rose from {memory['ready_bytes'] / mebibyte:.0f} to "
        f"{memory['peak_bytes'] / mebibyte:.0f} MiB, by **{memory['share']:.2f} times** the size "
        "of the cache."
    )


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


def _spread(numbers: Sequence[float], digits: int) -> str:
    """The median, with minimum and maximum if there are several; empty for NaN."""
    middle, low, high = spread(numbers)
    if math.isnan(middle):
        return ""
    text = f"{middle:.{digits}f}"
    return text if len(numbers) < 2 else f"{text} ({low:.{digits}f} - {high:.{digits}f})"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(_row(row) for row in (head, rule, *rows))


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
