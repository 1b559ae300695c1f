"""Sequences of one request: merged, bounded, and closed whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

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
from runners.contracts.text import SamplingParams
from tests.support.fake_runner import FakeTextRunner

ENDLESS = SamplingParams(max_new_tokens=10**6)
SHORT = SamplingParams(max_new_tokens=6)


@pytest.fixture
async def runner() -> FakeTextRunner:
    return FakeTextRunner()


@pytest.fixture
async def request_() -> AsyncIterator[RequestContext]:
    """The current request; its resources are closed at the end, as the middleware does."""
    context = RequestContext(request_id="r", route="other", timeout=60.0)
    enter_request(context)
    yield context
    await context.resources.aclose()


async def test_each_sequence_gets_its_own_deltas(
    runner: FakeTextRunner, request_: RequestContext
) -> None:
    admission = Admission(8)
    prompts = ["hello", "the cat sat"]
    alone = [
        (await (await TextModel(runner, admission).generate([p], SHORT)).collect())[0]
        for p in prompts
    ]
    generation = await TextModel(runner, admission).generate([*prompts], SHORT, n=2)
    assert len(generation) == 4
    one, two = alone
    assert await generation.collect() == [one, one, two, two]
    assert one.token_ids != two.token_ids
    assert one.finish_reason == "length"
    assert generation.prompt_tokens == [5, 5, 11, 11]
    assert generation.usage_prompt_tokens == 16
    assert generation.generated_tokens == 24


async def test_seeds_of_n_sequences_count_up_and_wrap(
    runner: FakeTextRunner, request_: RequestContext
) -> None:
    text = TextModel(runner, Admission(8))

    async def tokens(seed: int, n: int) -> list[list[int]]:
        sampling = SamplingParams(max_new_tokens=8, temperature=2.0, seed=seed)
        outputs = await (await text.generate(["hello"], sampling, n=n)).collect()
        return [output.token_ids for output in outputs]

    assert await tokens(5, 2) == [*await tokens(5, 1), *await tokens(6, 1)]
    assert await tokens(2**63 - 1, 2) == [*await tokens(2**63 - 1, 1), *await tokens(0, 1)]


@pytest.mark.parametrize("prompts", [["hello"], ["hello", "world", "the"]])
async def test_what_still_runs_is_closed_with_the_request(
    runner: FakeTextRunner, request_: RequestContext, prompts: list[str]
) -> None:
    admission = Admission(8)
    generation = await TextModel(runner, admission).generate([*prompts], ENDLESS)
    await anext(aiter(generation))
    assert len(runner.running) == len(prompts)
    await request_.resources.aclose()
    assert admission.admitted == 0
    assert not [task for task in asyncio.all_tasks() if "_pump" in repr(task)]
    assert runner.running == set()


async def test_one_refused_prompt_refuses_all(
    runner: FakeTextRunner, request_: RequestContext
) -> None:
    admission = Admission(8)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        await TextModel(runner, admission).generate(["hello", [10**6], "world"], ENDLESS)
    await request_.resources.aclose()
    assert admission.admitted == 0
    assert runner.running == set()


async def test_the_deadline_holds_while_a_prompt_waits_to_be_accepted(
    runner: FakeTextRunner, request_: RequestContext
) -> None:
    request_.timeout = 0.2
    runner.accepting.clear()
    with pytest.raises(DeadlineExceeded):
        await TextModel(runner, Admission(8)).generate(["hello"], SHORT)


@pytest.mark.parametrize("prompts", [["hello"], ["hello", "world"]])
async def test_the_deadline_holds_midway(
    runner: FakeTextRunner, request_: RequestContext, prompts: list[str]
) -> None:
    generation = await TextModel(runner, Admission(8)).generate([*prompts], ENDLESS)
    deltas = aiter(generation)
    await anext(deltas)
    request_.timeout = asyncio.get_running_loop().time() - request_.arrived + 0.05
    with pytest.raises(DeadlineExceeded):
        while True:
            await anext(deltas)


async def test_admission_counts_sequences(runner: FakeTextRunner, request_: RequestContext) -> None:
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


async def test_only_its_own_name_is_served(runner: FakeTextRunner) -> None:
    text = TextModel(runner, Admission(1))
    text.require(None)
    text.require("fake")
    with pytest.raises(ModelNotServed):
        text.require("another")


@pytest.mark.parametrize("others", [[], ["world", "the"]])
async def test_a_lost_rank_ends_the_whole_request(
    runner: FakeTextRunner, request_: RequestContext, others: list[str]
) -> None:
    admission = Admission(8)
    generation = await TextModel(runner, admission).generate(["hello", *others], ENDLESS)
    runner.lost = True
    with pytest.raises(RunnerUnavailable):
        await generation.collect()
    await request_.resources.aclose()
    assert admission.admitted == 0
    assert runner.running == set()
