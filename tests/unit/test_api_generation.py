"""Sequences of one request, on a real runner: merged, bounded, and closed whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from api.http.admission import Admission
from api.http.context import RequestContext, enter_request
from api.models.text import TextModel
from runners.contracts.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    RunnerUnavailable,
)
from runners.contracts.text import SamplingParams, TextRunner
from tests.support.generating import serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import own_ranks

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENDLESS = SamplingParams(max_new_tokens=400, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(folder: Path) -> AsyncIterator[TextRunner]:
    async with serving(folder) as ready:
        yield ready


@pytest_asyncio.fixture(loop_scope="module")
async def request_() -> AsyncIterator[RequestContext]:
    """The current request; its resources are closed at the end, as the middleware does."""
    context = RequestContext(request_id="r", route="other", timeout=60.0)
    enter_request(context)
    yield context
    await context.resources.aclose()


@contextmanager
def stopped_rank() -> Iterator[None]:
    """The rank answers nothing meanwhile."""
    [rank] = own_ranks()
    os.kill(rank.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(rank.pid, signal.SIGCONT)


async def is_idle(runner: TextRunner) -> bool:
    """Whether the engine lets go of everything, as its next heartbeats tell."""
    for _ in range(60):
        health = runner.health()
        if health.running == health.waiting == health.kv_tokens_used == 0:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_many_sequences_are_merged_and_collected(
    runner: TextRunner, folder: Path, request_: RequestContext
) -> None:
    admission = Admission(8)
    prompts = ["hello", "the cat sat"]
    generation = await TextModel(runner, admission).generate([*prompts], SHORT, n=2)
    assert admission.admitted == 4
    outputs = await generation.collect()
    one, two = greedy(folder, prompts, 6)
    assert [output.token_ids for output in outputs] == [one, one, two, two]
    assert {output.finish_reason for output in outputs} == {"length"}
    assert generation.usage_prompt_tokens == sum(generation.prompt_tokens) // 2
    assert generation.generated_tokens == 24


async def test_seeds_of_n_sequences_count_up_and_wrap(
    runner: TextRunner, request_: RequestContext
) -> None:
    text = TextModel(runner, Admission(8))

    async def tokens(seed: int, n: int) -> list[list[int]]:
        sampling = SamplingParams(max_new_tokens=8, temperature=2.0, seed=seed, ignore_eos=True)
        outputs = await (await text.generate(["hello"], sampling, n=n)).collect()
        return [output.token_ids for output in outputs]

    assert await tokens(5, 2) == [*await tokens(5, 1), *await tokens(6, 1)]
    assert await tokens(2**63 - 1, 2) == [*await tokens(2**63 - 1, 1), *await tokens(0, 1)]


@pytest.mark.parametrize("prompts", [["hello"], ["hello", "world", "the"]])
async def test_what_still_runs_is_closed_with_the_request(
    runner: TextRunner, request_: RequestContext, prompts: list[str]
) -> None:
    admission = Admission(8)
    generation = await TextModel(runner, admission).generate([*prompts], ENDLESS)
    await anext(aiter(generation))
    await request_.resources.aclose()
    assert admission.admitted == 0
    assert not [task for task in asyncio.all_tasks() if "_pump" in repr(task)]
    assert await is_idle(runner)


async def test_one_refused_prompt_refuses_all(runner: TextRunner, request_: RequestContext) -> None:
    admission = Admission(8)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        await TextModel(runner, admission).generate(["hello", [10**6], "world"], ENDLESS)
    await request_.resources.aclose()
    assert admission.admitted == 0
    assert await is_idle(runner)


@pytest.mark.parametrize("prompts", [["hello"], ["hello", "world"]])
async def test_leaving_while_prompts_are_accepted_leaves_nothing(
    runner: TextRunner, request_: RequestContext, prompts: list[str]
) -> None:
    admission = Admission(8)
    with stopped_rank():
        opening = asyncio.create_task(TextModel(runner, admission).generate([*prompts], ENDLESS))
        await asyncio.sleep(0.1)
        assert admission.admitted == len(prompts)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await request_.resources.aclose()
        assert admission.admitted == 0
    assert await is_idle(runner)


async def test_the_deadline_holds_while_a_prompt_waits_to_be_accepted(
    runner: TextRunner, request_: RequestContext
) -> None:
    request_.timeout = 0.2
    with stopped_rank(), pytest.raises(DeadlineExceeded):
        await TextModel(runner, Admission(8)).generate(["hello"], SHORT)


@pytest.mark.parametrize("prompts", [["hello"], ["hello", "world"]])
async def test_the_deadline_holds_midway(
    runner: TextRunner, request_: RequestContext, prompts: list[str]
) -> None:
    generation = await TextModel(runner, Admission(8)).generate([*prompts], ENDLESS)
    deltas = aiter(generation)
    await anext(deltas)
    request_.timeout = asyncio.get_running_loop().time() - request_.arrived + 0.05
    with pytest.raises(DeadlineExceeded):
        while True:
            await anext(deltas)


async def test_admission_counts_sequences(runner: TextRunner, request_: RequestContext) -> None:
    admission = Admission(3)
    text = TextModel(runner, admission)
    await text.generate(["hello"], ENDLESS, n=2)
    with pytest.raises(Overloaded) as caught:
        await text.generate(["b", "c"], SHORT)
    assert caught.value.retry_after_s >= 1
    assert admission.admitted == 2, "a refused request holds nothing"
    with pytest.raises(InvalidRequest):
        await text.generate(["d"] * 4, SHORT)
    await text.tokenize("x", add_special_tokens=True)
    assert admission.admitted == 2


async def test_only_its_own_name_is_served(runner: TextRunner) -> None:
    text = TextModel(runner, Admission(1))
    text.require(None)
    text.require("llama")
    with pytest.raises(ModelNotServed):
        text.require("another")


@pytest.mark.parametrize("others", [[], ["world", "the"]])
async def test_a_dead_rank_ends_the_whole_request(
    runner: TextRunner, request_: RequestContext, others: list[str]
) -> None:
    admission = Admission(8)
    generation = await TextModel(runner, admission).generate(["hello", *others], ENDLESS)
    [rank] = own_ranks()
    rank.kill()
    with pytest.raises(RunnerUnavailable):
        await generation.collect()
    await request_.resources.aclose()
    assert admission.admitted == 0
    await wait_ready(runner)
