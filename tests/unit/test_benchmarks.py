"""The benchmarks' arithmetic, on a known timeline."""

from __future__ import annotations

import asyncio
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import limit, report, results, workload
from benchmarks.client import RequestFailed, run_closed_loop, run_poisson
from benchmarks.metrics import Record, Window, gaps, percentile, spread, summarise, time_per_token
from benchmarks.processes import ProcessTree
from benchmarks.servers import SERVERS
from benchmarks.table import Plan

WORDS = [f" word{i}" for i in range(500)]


def record(sent: float, *events: float, tokens: int = 4, end: float | None = None) -> Record:
    return Record(
        prompt_tokens=10,
        output_tokens=4,
        sent=sent,
        end=events[-1] if end is None else end,
        events=list(events),
        tokens=tokens,
    )


# --- the workload


def test_a_workload_is_the_same_every_time_and_differs_between_loads() -> None:
    lists = {c: workload.closed_loop(WORDS, concurrency=c, count=20) for c in (1, 4, 16)}
    assert lists[4] == workload.closed_loop(WORDS, concurrency=4, count=20)
    prompts = [r.prompt for requests in lists.values() for r in requests]
    assert len(set(prompts)) == len(prompts)


def test_a_shorter_list_is_the_beginning_of_a_longer_one() -> None:
    short, long = (workload.closed_loop(WORDS, concurrency=8, count=n) for n in (5, 50))
    assert long[:5] == short


def test_requests_are_of_known_size() -> None:
    for request in workload.closed_loop(WORDS, concurrency=2, count=200):
        assert len(request.prompt.split()) == request.prompt_tokens
        assert workload.PROMPT_TOKENS[0] <= request.prompt_tokens <= workload.PROMPT_TOKENS[1]
        assert workload.OUTPUT_TOKENS[0] <= request.output_tokens <= workload.OUTPUT_TOKENS[1]


def test_poisson_requests_have_the_configured_rate() -> None:
    requests = workload.poisson(WORDS, rate=4.0, count=4000)
    times = [r.at for r in requests]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] / len(times) == pytest.approx(1 / 4, rel=0.05)
    assert requests == workload.poisson(WORDS, rate=4.0, count=4000)


def test_a_list_has_more_requests_than_clients() -> None:
    plan = Plan(servers=[])
    for clients in plan.concurrencies:
        count = workload.request_count(clients, per_client=plan.per_client, extra=plan.extra)
        assert count > clients
        assert count >= 4


# --- metrics


def test_tokens_are_spread_over_the_events() -> None:
    assert record(0, 1, 2, 3, 4).tokens_within(0, 2.5) == 2
    # Two events with two tokens each.
    assert record(0, 1, 3).tokens_within(0, 2.5) == 2


def test_tokens_without_streaming_are_spread_over_the_duration() -> None:
    whole = record(10, tokens=4, end=18)
    assert whole.tokens_within(10, 14) == 2
    assert whole.tokens_within(0, 12) == 1
    assert whole.tokens_within(20, 30) == 0
    assert whole.first_token == 18
    assert time_per_token(whole) == 2


def test_a_summary_of_a_known_timeline() -> None:
    records = [record(0, 1, 2, 3, 4), record(0, 2, 3, 4, 5), record(2, 3, 4, 5, 6)]
    summary = summarise(records, Window(start=0, end=4, cpu_seconds=2, other_cpu_seconds=1))
    # 4 tokens of the first, 3 of the second, 2 of the third.
    assert summary.tokens == 9
    assert summary.tokens_per_second == 9 / 4
    assert summary.tokens_per_cpu_second == 9 / 2
    assert summary.prompt_tokens == 30
    assert (summary.ttft_p50, summary.ttft_p95) == (1, 2)
    assert summary.tpot_p50 == 1
    assert summary.disturbance == 0.25
    assert (summary.requests, summary.failed, summary.problems) == (3, 0, [])


def test_failed_and_short_responses_are_counted_and_give_no_tokens() -> None:
    failed = record(0, 1, 2)
    failed.error = "TimeoutError: "
    short = record(0, 1, 2, 3, tokens=3)
    misread = record(0, 1, 2, 3, 4)
    misread.counted_prompt = 11
    summary = summarise([failed, short, misread, record(0, 1, 2, 3, 4)], Window(0, 4, 1))
    assert (summary.requests, summary.failed) == (4, 3)
    assert summary.problems == [
        "11 prompt tokens instead of 10",
        "3 tokens instead of 4",
        "TimeoutError: ",
    ]
    assert summary.tokens == 4


def test_nothing_measured_is_not_a_number() -> None:
    summary = summarise([], Window(0, 0, 0))
    assert math.isnan(summary.tokens_per_second)
    assert math.isnan(summary.ttft_p95)
    assert all(map(math.isnan, spread([])))


def test_percentiles_and_spreads() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([3.0], 95) == 3
    assert spread([3.0, math.nan, 1.0, 2.0]) == (2, 1, 3)


def test_gaps_are_those_that_end_in_the_window() -> None:
    assert gaps(record(0, 1, 2, 4, 9)) == [1, 2, 5]
    assert gaps(record(0, 1, 2, 4, 9), 3, 5) == [2]


def test_the_limit_is_the_time_of_prompts_and_steps() -> None:
    top = {"t_prefill": 0.01, "t_decode": {"4": 0.5}}
    # 100 prompt tokens take 1 s, 40 tokens in steps of 4 take 5 s.
    assert limit.tokens_per_second(top, 4, prompt_tokens=100, tokens=40) == pytest.approx(40 / 6)


# --- the client


class Echo:
    """A dialect without a server: a token each 10 ms; `broken` prompts fail."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def send(self, session: Any, url: str, request: workload.Request, record: Record) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(request.output_tokens):
            await asyncio.sleep(0.01)
            record.events.append(asyncio.get_running_loop().time())
            record.tokens += 1
        self.running -= 1
        if request.prompt == "broken":
            raise RequestFailed("500: no")


async def test_a_closed_loop_keeps_its_clients_busy_and_ends_the_window_at_the_last_one() -> None:
    requests = [workload.Request("x", 1, 3) for _ in range(6)]
    requests += [workload.Request("broken", 1, 3)]
    echo = Echo()
    records, window = await run_closed_loop(
        "", echo, requests, concurrency=2, tree=ProcessTree(os.getpid())
    )
    assert echo.most == 2
    assert len(records) == 7
    assert [r.problem for r in records if r.problem] == ["RequestFailed: 500: no"]
    last = max(r.end for r in records)
    assert window.start <= min(r.sent for r in records)
    assert max(r.sent for r in records) <= window.end < last


async def test_poisson_requests_do_not_wait_for_responses() -> None:
    requests = [workload.Request("x", 1, 20, at=0.01 * i) for i in range(4)]
    echo = Echo()
    records, window = await run_poisson("", echo, requests, tree=ProcessTree(os.getpid()))
    assert echo.most == 4
    assert all(r.problem is None for r in records)
    assert window.seconds < min(r.end for r in records) - window.start


# --- results and report


def cell(server: str, load: int, number: int, speed: float, **fields: Any) -> results.Cell:
    where = {"table": "wall", "server": server, "load": load, "round": number, "threads": 2}
    records = [record(0, 1, 2, 3, 4)]
    summary = summarise(records, Window(0, 4, 1)).__dict__ | {"tokens_per_second": speed}
    return where | {"startup_s": 1.0, "peak_bytes": 2**20} | summary | fields


def test_a_report_compares_round_by_round() -> None:
    data: results.Results = {
        "cells": [
            cell("triptych", 4, 1, 20.0),
            cell("triptych", 4, 2, 30.0),
            cell("static", 4, 1, 10.0),
            cell("static", 4, 2, 10.0, failed=1, problems=["500: no"]),
            cell("llama.cpp-q8", 4, 1, 40.0),
        ],
        "unavailable": {"openvino-f32": "no such package"},
    }
    text = report.render(data)
    assert "| triptych / static | 2.50 (2.00 - 3.00) |" in text
    assert "triptych / llama.cpp-q8" not in text, "8-bit weights are compared only with one another"
    assert "`static` at 4 (wall, round 2): 1 of 1 failed: 500: no" in text
    assert "`openvino-f32` is missing: no such package" in text


def test_another_run_replaces_what_it_measures_and_keeps_the_rest(tmp_path: Path) -> None:
    data: results.Results = {
        "cells": [cell("triptych", 1, 1, 1.0), cell("static", 1, 1, math.nan)],
        "versions": {"triptych": "1", "static": "2"},
    }
    results.replace_cells(data, ["triptych"])
    results.save(data, tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    again = results.load(tmp_path / "results.json")
    assert [c["server"] for c in again["cells"]] == ["static"]
    assert again["versions"] == {"static": "2"}
    where = {"table": "wall", "server": "static"}
    assert math.isnan(results.values(again, "tokens_per_second", **where)[0])


def test_server_names_are_unique() -> None:
    assert [server.name for server in SERVERS.values()] == list(SERVERS)
