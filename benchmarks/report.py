"""RESULTS.md from results.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import limit
from benchmarks.metrics import spread
from benchmarks.results import Cell, Results, loads, servers, values
from benchmarks.servers import EIGHT_BIT, OURS
from benchmarks.workload import OUTPUT_TOKENS, PROMPT_TOKENS

PER_ROUND = "median (lowest - highest round)"
DISTURBED = 0.1
"""CPU cores kept busy by others, above which a cell is named."""


def render(results: Results) -> str:
    """The whole report in Markdown."""
    parts = [
        "# Results",
        "Written by `make bench`; what is measured and how to read it says [README.md](README.md).",
        _machine(results.get("machine", {})),
        *(_wall(results) if servers(results, "wall") else ()),
        *(_cpu(results) if servers(results, "cpu") else ()),
        *_others(results),
        _remarks(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(about: dict[str, Any]) -> str:
    if not about:
        return ""
    return (
        f"**Machine:** {about['cores']} cores of {about['cpu']} ({', '.join(about['isa'])}), "
        f"{about['memory_bytes'] / 2**30:.0f} GiB memory, copying at "
        f"{about['copy_bytes_per_second'] / 1e9:.1f} GB/s (read and written). "
        f"**Software:** Triptych {about['commit']}, Python {about['python']}, torch "
        f"{about['torch']}, transformers {about['transformers']}."
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
    """Two more rows: what the machine can do at most, and our share of it."""
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
    """Of the very mix of prompt and output tokens that fell into the cell's window."""
    top = results["limit"]
    if str(cell["load"]) not in top["t_decode"]:
        return math.nan
    return limit.tokens_per_second(top, cell["load"], cell["prompt_tokens"], cell["tokens"])


def _ratios(results: Results, table: str, field: str, clients: Sequence[Any]) -> str:
    """Ours by each peer's, like with like, round by round."""
    rows = []
    for ours in OURS:
        eight = ours in EIGHT_BIT
        for peer in servers(results, table):
            if peer in OURS or (peer in EIGHT_BIT) != eight:
                continue
            cells = [_ratio(results, table, field, ours, peer, count) for count in clients]
            if any(cells):
                rows.append([f"{ours} / {peer}", *cells])
    if not rows:
        return ""
    return f"### Ours by the peer's\n\n{_table(['', *clients], rows)}"


def _ratio(results: Results, table: str, field: str, ours: str, peer: str, load: Any) -> str:
    one, other = (values(results, field, table=table, server=s, load=load) for s in (ours, peer))
    pairs = [a / b for a, b in zip(one, other, strict=False) if b]
    return _spread(pairs, 2)


def _latency(results: Results, names: Sequence[str], clients: Sequence[Any]) -> str:
    def cell(name: str, load: Any) -> str:
        where = {"table": "wall", "server": name, "load": load}
        first50, first95, each = (
            spread(values(results, field, **where))[0]
            for field in ("ttft_p50", "ttft_p95", "tpot_p50")
        )
        known = not math.isnan(first50)
        return f"{first50:.2f} / {first95:.2f} / {each * 1000:.0f}" if known else ""

    rows = [[name, *(cell(name, load) for load in clients)] for name in names]
    return (
        "## Time to first token in s, p50 / p95, and time per further token in ms, p50\n\n"
        + _table(["server", *clients], rows)
        + "\n\nEach is the median of the rounds. `static` does not stream: its first token comes "
        "with its last."
    )


def _resources(results: Results, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        mine = [
            c
            for c in results["cells"]
            if c["table"] == "wall" and c["server"] == name and "skipped" not in c
        ]
        rows.append(
            [
                name,
                results.get("versions", {}).get(name, ""),
                _spread(sorted({c["startup_s"] for c in mine}), 1),
                f"{max((c['peak_bytes'] for c in mine), default=0) / 2**20:.0f}",
            ]
        )
    head = ["server", "version", "start to first answer, s", "peak memory, MiB"]
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


def _bound(top: dict[str, Any]) -> str:
    prompt, answer = (sum(both) / 2 for both in (PROMPT_TOKENS, OUTPUT_TOKENS))
    rows = [
        [
            count,
            f"{seconds * 1000:.1f}",
            f"{limit.tokens_per_second(top, int(count), prompt, answer):.1f}",
        ]
        for count, seconds in top["t_decode"].items()
    ]
    head = ["sequences", "a step of them, ms", "*limit*, tokens/s"]
    return (
        "## The limit\n\n"
        f"A prompt token takes {top['t_prefill'] * 1000:.2f} ms.\n\n{_table(head, rows)}\n\n"
        "For the workload's mean request; in the first table for what each cell really did."
    )


def _others(results: Results) -> Iterable[str]:
    if "limit" in results:
        yield _bound(results["limit"])
    if entries := results.get("overhead"):
        rows = []
        for clients in sorted({e["concurrency"] for e in entries}):
            mine = [e for e in entries if e["concurrency"] == clients]
            http, engine = (
                [e[side]["tokens_per_second"] for e in mine] for side in ("http", "engine")
            )
            share = [a / b for a, b in zip(http, engine, strict=True)]
            rows.append([clients, _spread(http, 1), _spread(engine, 1), _spread(share, 3)])
        head = ["clients", "over HTTP, tokens/s", "engine alone, tokens/s", "HTTP / engine"]
        yield f"## What serving costs\n\n{_table(head, rows)}"
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
        mine = [e for e in entries if e["concurrency"] == clients]
        ours, stock = ([e[side] for e in mine] for side in ("ours", "stock"))
        ratio = [a / b for a, b in zip(ours, stock, strict=True)]
        rows.append([clients, _spread(ours, 1), _spread(stock, 1), _spread(ratio, 2)])
    head = ["sequences", "our pipeline mode, tokens/s", "stock MIIPipeline, tokens/s", "ratio"]
    return (
        "## DeepSpeed-MII\n\n"
        f"The same requests in batches, on the same engine.\n\n{_table(head, rows)}"
    )


def _gap(gap: dict[str, Any]) -> str:
    usual = gap["usual_s"]
    median, p99, longest = (
        gap[name] / usual for name in ("during_p50_s", "during_p99_s", "longest_s")
    )
    return (
        "## What a long prompt does to running streams\n\n"
        f"{gap['streams']} streams, a token each {usual * 1000:.0f} ms; then a prompt of "
        f"{gap['long_prompt']:,} tokens, read in {gap['prefill_s']:.1f} s. Meanwhile the longest "
        f"gap between two tokens of a stream is {gap['longest_s'] * 1000:.0f} ms, "
        f"**{longest:.1f} times** the usual one (p99: {p99:.1f} times, median: {median:.1f} times)."
    )


def _quality(quality: dict[str, Any]) -> str:
    return (
        "## What 8-bit weights cost\n\n"
        f"The trained demo model over {quality['tokens']:,} tokens of answers it never saw: the "
        f"same likeliest token in **{quality['agreement']:.2%}** of them, mean divergence "
        f"{quality['divergence']:.1e} nats, perplexity {quality['perplexity']:.4f} in float32 and "
        f"{quality['perplexity_int8']:.4f} in int8."
    )


def _images(entries: Sequence[dict[str, Any]]) -> str:
    def of(server: str, clients: int, field: str = "rate") -> list[float]:
        return [e[field] for e in entries if (e["server"], e["concurrency"]) == (server, clients)]

    counts = sorted({e["concurrency"] for e in entries})
    rows: list[list[object]] = [
        [name, *(_spread(of(name, count), 2) for count in counts)]
        for name in dict.fromkeys(e["server"] for e in entries)
    ]
    ratios = [
        [a / b for a, b in zip(of("triptych", n), of("diffusers", n), strict=True)] for n in counts
    ]
    rows.append(["*triptych / diffusers*", *(_spread(ratio, 2) for ratio in ratios)])
    batch = [
        four / one
        for four, one in zip(
            of("triptych", counts[-1], "seconds_per_batch"),
            of("triptych", counts[0], "seconds_per_batch"),
            strict=True,
        )
    ]
    failed = sum(e["failed"] for e in entries)
    return (
        "## Pictures per second, by concurrent clients\n\n"
        + _table(["server", *counts], rows)
        + f"\n\nFour pictures at once take **{_spread(batch, 2)}** of the time of four one after "
        f"another. {failed} failed."
    )


def _split(split: dict[str, Any]) -> str:
    sides = list(dict.fromkeys(c["side"] for c in split["cells"]))
    loads = sorted({c["load"] for c in split["cells"]})

    def speeds(side: str, load: int) -> list[float]:
        mine = [c for c in split["cells"] if (c["side"], c["load"]) == (side, load)]
        return [c["tokens_per_second"] for c in mine]

    def cells(side: str, load: int) -> list[str]:
        own, whole = speeds(side, load), speeds(sides[0], load)
        share = [a / b for a, b in zip(own, whole, strict=True)]
        return [_spread(own, 1), _spread(share, 2)]

    head = ["side", *(x for n in loads for x in (f"tokens/s, {n} clients", "of one process"))]
    rows = [[side, *(x for n in loads for x in cells(side, n))] for side in sides]
    told = split["control"]
    return (
        "## What splitting a model costs\n\n"
        "Two ranks of one thread each, against one process with two.\n\n"
        f"{_table(head, rows)}\n\n"
        f"A step's plan reaches the other rank, and an answer comes back, in "
        f"**{told['decode_us']:.0f} µs** for 16 decoding sequences and {told['mixed_us']:.0f} µs "
        f"with 512 tokens of a prompt beside them; the answer alone takes "
        f"{told['acknowledgement_us']:.0f} µs, the plan as a pickled object "
        f"{told['pickled_us']:.0f} µs."
    )


def _memory(memory: dict[str, Any]) -> str:
    mebibyte = 2**20
    return (
        "## What a full queue costs in memory\n\n"
        f"{memory['requests']} requests at once with room for {memory['kv_tokens']:,} tokens of "
        f"KV ({memory['kv_bound_bytes'] / mebibyte:.0f} MiB): {len(memory['failed'])} failed. The "
        f"rank's memory rose from {memory['ready_bytes'] / mebibyte:.0f} to "
        f"{memory['peak_bytes'] / mebibyte:.0f} MiB, by **{memory['share']:.2f} times** the bound."
    )


def _remarks(results: Results) -> str:
    """Everything that did not go as planned."""
    said = [f"`{name}` is missing: {why}" for name, why in results.get("unavailable", {}).items()]
    for cell in results.get("cells", []):
        name = f"`{cell['server']}` at {cell['load']} ({cell['table']}, round {cell['round']})"
        if "skipped" in cell:
            said.append(f"{name} was left out: {cell['skipped']}")
        elif cell["failed"]:
            problems = "; ".join(cell["problems"])
            said.append(f"{name}: {cell['failed']} of {cell['requests']} failed: {problems}")
        said += _disturbed(name, cell)
    for entry in results.get("overhead", []):
        for side in ("engine", "http"):
            name = f"`{side}` at {entry['concurrency']} (overhead, round {entry['round']})"
            said += _disturbed(name, entry[side])
    for name, why in results.get("failed", {}).items():
        said.append(f"the {name} measurement failed: {why}")
    if not said:
        return "No request failed, nothing was left out."
    return "## Remarks\n\n" + "\n".join(f"- {line}" for line in said)


def _disturbed(name: str, cell: Cell) -> list[str]:
    busy = cell.get("disturbance") or 0
    return [f"{name}: others kept {busy:.2f} cores busy meanwhile"] if busy > DISTURBED else []


def _spread(found: Sequence[float], digits: int) -> str:
    """Median, and the extremes where there are several."""
    middle, low, high = spread(found)
    if math.isnan(middle):
        return ""
    text = f"{middle:.{digits}f}"
    return text if len(found) < 2 else f"{text} ({low:.{digits}f} - {high:.{digits}f})"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(_row(row) for row in (head, rule, *rows))


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
