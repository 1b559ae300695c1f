"""The sections of RESULTS.md below its tables: one for each other measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import limit
from benchmarks.metrics import spread
from benchmarks.results import Results
from benchmarks.workload import OUTPUT_TOKENS, PROMPT_TOKENS


def sections(results: Results) -> Iterable[str]:
    """The sections of what was measured, in Markdown."""
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
            rows.append(
                [clients, spread_text(http, 1), spread_text(engine, 1), spread_text(share, 3)]
            )
        head = ["clients", "over HTTP, tokens/s", "engine alone, tokens/s", "HTTP / engine"]
        yield f"## Serving overhead\n\n{table_text(head, rows)}"
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
    if overload := results.get("overload"):
        yield _overload(overload)
    if soak := results.get("soak"):
        yield _soak(soak)


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
        f"A prompt token takes {times['t_prefill'] * 1000:.2f} ms.\n\n{table_text(head, rows)}\n\n"
        "Here for the workload's mean request; in the first table for the tokens of each cell."
    )


def _mii(entries: list[dict[str, Any]]) -> str:
    rows = []
    for clients in sorted({e["concurrency"] for e in entries}):
        matches = [e for e in entries if e["concurrency"] == clients]
        triptych, stock = ([e[side] for e in matches] for side in ("ours", "stock"))
        ratio = [a / b for a, b in zip(triptych, stock, strict=True)]
        rows.append(
            [clients, spread_text(triptych, 1), spread_text(stock, 1), spread_text(ratio, 2)]
        )
    head = [
        "sequences",
        "Triptych pipeline mode, tokens/s",
        "stock MIIPipeline, tokens/s",
        "ratio",
    ]
    return (
        "## DeepSpeed-MII\n\n"
        f"The same batches of requests on the same engine.\n\n{table_text(head, rows)}"
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
        [name, *(spread_text(rates(name, count), 2) for count in counts)]
        for name in dict.fromkeys(e["server"] for e in entries)
    ]
    ratios = [
        [a / b for a, b in zip(rates("triptych", n), rates("diffusers", n), strict=True)]
        for n in counts
    ]
    rows.append(["*triptych / diffusers*", *(spread_text(ratio, 2) for ratio in ratios)])
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
        + table_text(["server", *counts], rows)
        + f"\n\nFour concurrent images take **{spread_text(batch, 2)}** of the time of four "
        f"sequential ones. {failed} failed."
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
        return [spread_text(split_speeds, 1), spread_text(share, 2)]

    head = [
        "side",
        *(x for n in loads for x in (f"tokens/s, {n} clients", "relative to one process")),
    ]
    rows = [[side, *(x for n in loads for x in cells(side, n))] for side in sides]
    control = split["control"]
    return (
        "## Cost of tensor parallelism\n\n"
        "Two ranks of one thread each, against one process with two threads.\n\n"
        f"{table_text(head, rows)}\n\n"
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


def _overload(overload: dict[str, Any]) -> str:
    full, over = overload["full"], overload["over"]
    return (
        "## Overload\n\n"
        f"A queue of {overload['capacity']} sequences, for {overload['seconds']:.0f} s with "
        f"{overload['capacity']} clients and for as long with {overload['clients']}, who come back "
        "after `Retry-After`. Tokens per second under overload, relative to the full queue without "
        f"it: **{over['tokens_per_second'] / full['tokens_per_second']:.2f}**; per CPU second of "
        f"the rank **{over['tokens_per_cpu_second'] / full['tokens_per_cpu_second']:.2f}** (the "
        f"clients take CPU time as well). {over['refused']:,} requests were refused, all with 429 "
        f"and `Retry-After`; {over['other']} had another end. Probes took "
        f"{full['probe_max_s'] * 1000:.0f} ms at most, under overload "
        f"{over['probe_p99_s'] * 1000:.0f} ms (p99) and {over['probe_max_s'] * 1000:.0f} ms at "
        f"most. The HTTP worker's memory rose by {over['growth_bytes'] / 2**20:.0f} MiB."
    )


def _soak(soak: dict[str, Any]) -> str:
    counts, problems = soak["counts"], soak["problems"]
    total = sum(counts.values())
    [before, after] = (size / 2**20 for size in soak["worker_bytes"])
    fds = [f"{count:.0f}" for count in soak["worker_descriptors"]]
    recovery = spread_text(soak["recovery_s"], 0)
    return (
        "## Soak\n\n"
        f"`make soak`: {soak['minutes']:.0f} minutes of mixed requests for text and images, "
        f"{total:,} in all, with {soak['kills']} kills of a rank or its launcher. "
        f"{counts.get('right', 0):,} were right, compared with references token by token; "
        f"{counts.get('left', 0):,} clients left; {counts.get('failed', 0):,} requests failed "
        f"because of a kill; **{counts.get('wrong', 0)} were wrong, {counts.get('hung', 0)} hung, "
        f"{counts.get('unexpected', 0)} failed without a kill**. Ready again after {recovery} s. "
        f"The HTTP worker's memory was {before:.0f} MiB in the first quarter and {after:.0f} MiB "
        f"in the last, its descriptors {fds[0]} and {fds[1]}."
        + "".join(f"\n- {problem}" for problem in problems)
    )


def spread_text(numbers: Sequence[float], digits: int) -> str:
    """The median, with minimum and maximum if there are several; empty for NaN."""
    middle, low, high = spread(numbers)
    if math.isnan(middle):
        return ""
    text = f"{middle:.{digits}f}"
    return text if len(numbers) < 2 else f"{text} ({low:.{digits}f} - {high:.{digits}f})"


def table_text(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(row_text(row) for row in (head, rule, *rows))


def row_text(cells: Sequence[object]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"
