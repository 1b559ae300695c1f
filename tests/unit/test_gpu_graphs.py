"""Graphs of steps: captured when needed, bounded, and used only if they give the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runners.text.gpu.graphs import (
    CaptureError,
    GraphCache,
    RecordedGraph,
    row_sizes,
    sequence_sizes,
)
from tests.support.models import greedy
from tests.support.scheduling import COUNT, Run, gpu_runner, pages, sequence

PROMPTS = [[5, 6, 7], [9] * 30, [11], list(range(20, 70))]
BLOCK = 32


def test_graphs_are_captured_when_needed_again_and_while_idle(llama: Path) -> None:
    engine = pages(llama, max_batch_size=8)
    graphs = gpu_runner(engine).graphs
    assert graphs is not None
    assert len(graphs) == 1, "a step of one sequence, before the model serves"
    run = Run(engine)
    run.scheduler.add(sequence("first", [5, 6, 7], 2))
    run.drain()
    assert len(graphs) == 1, "no prompt waits for a graph"
    run.scheduler.add(sequence("second", [5, 6, 7], 2))
    run.drain()
    assert len(graphs) == 2, "prompts of that length come again"
    captured = []
    for _ in range(5):
        engine.idle()
        captured.append(len(graphs))
    assert captured == [3, 4, 5, 5, 5], "2, 4 and 8 sequences"
    run.scheduler.add(sequence("again", [5, 6, 7], 12))
    run.drain()
    assert run.tokens["again"] == greedy(llama, [[5, 6, 7]], 12)[0]


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_graph_that_gives_something_else_is_not_used(
    is_empty: bool, llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pages(llama)
    replay = RecordedGraph.replay

    def wrong(graph: RecordedGraph) -> None:
        if not is_empty:
            replay(graph)
            graph.output.add_(torch.arange(graph.output.shape[-1]))

    monkeypatch.setattr(RecordedGraph, "replay", wrong)
    run = Run(engine)
    for i, prompt in enumerate(PROMPTS):
        run.scheduler.add(sequence(str(i), prompt))
    run.drain()
    assert [run.tokens[str(i)] for i in range(4)] == greedy(llama, PROMPTS, COUNT)
    assert "a replay gave something else" in caplog.text
    graphs = gpu_runner(engine).graphs
    assert graphs is not None
    assert graphs.stopped
    assert len(graphs) == 0


def test_the_memory_of_graphs_is_bounded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = iter(range(0, 100 << 20, 5 << 20))
    monkeypatch.setattr(GraphCache, "_reserved", lambda _: next(reserved))
    cache = GraphCache[int](torch.device("cpu"), max_bytes=8 << 20)
    for key in range(4):
        assert not cache.is_due(key)
        if cache.is_due(key):
            cache.capture(key, lambda: torch.zeros(2))
    assert len(cache) == 2
    assert cache.stopped
    assert "2 graphs take 10 MiB" in caplog.text


def test_a_recorded_graph_reads_its_inputs_anew_and_runs_no_python() -> None:
    x = torch.arange(6.0).view(2, 3)
    calls = []

    def forward() -> torch.Tensor:
        calls.append(1)
        y = x.t().reshape(6)  # a copy here, which a replay has to make again
        y[1:3] *= 2
        return torch.nn.functional.linear(y.view(3, 2), torch.ones(4, 2)).softmax(-1) + y.sum()

    graph = RecordedGraph(forward)
    x.copy_(torch.randn(2, 3))
    graph.replay()
    assert len(calls) == 1
    assert torch.equal(graph.output, forward())


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x[x > 1],
        lambda x: x[: int(x.sum())],
        lambda x: x.nonzero(),
        lambda x: x if x.max() > 0 else -x,
    ],
)
def test_what_waits_for_a_value_cannot_be_captured(
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(CaptureError, match="waits for a value"):
        RecordedGraph(lambda: forward(torch.arange(4.0)))


def test_steps_are_padded_to_few_sizes() -> None:
    assert sequence_sizes(1) == [1]
    assert sequence_sizes(6) == [1, 2, 4, 6]
    assert sequence_sizes(300)[-3:] == [256, 288, 300]
    assert row_sizes(20) == [20]
    assert row_sizes(513) == [64, 96, 128, 192, 256, 384, 512, 513]
