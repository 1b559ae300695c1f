"""Sequences of one request in the ranks: merged, and closed whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from api.http.admission import Admission
from api.http.context import RequestContext, enter_request
from api.models.text import TextModel
from runners.contracts.errors import (
    InvalidRequest,
    RunnerUnavailable,
)
from runners.contracts.text import ChatMessage, ChatPrompt, SamplingParams, TextRunner
from tests.conftest import CHAT_TEMPLATE, LOOPING
from tests.support.generating import collect, ids_of, request, serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import own_ranks, stop

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("forked_ranks")]

ENDLESS = SamplingParams(max_new_tokens=400, ignore_eos=True)
LOOPS = ChatPrompt(messages=[ChatMessage(role="user", content=LOOPING)])
SHORT = SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model("llama", tmp_path_factory.mktemp("models") / "llama")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(folder: Path, forked_ranks: None) -> AsyncIterator[TextRunner]:
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
    stop(rank)
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


@pytest.mark.parametrize("call", ["submit", "tokenize"])
async def test_conversations_that_are_left_are_not_rendered(runner: TextRunner, call: str) -> None:
    def opening() -> Coroutine[Any, Any, object]:
        return runner.submit(request(LOOPS)) if call == "submit" else runner.tokenize(LOOPS)

    with stopped_rank():
        tasks = [asyncio.create_task(opening()) for _ in range(30)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {asyncio.CancelledError}
    await asyncio.sleep(2.5)  # until there is a heartbeat from after the calls
    assert await is_idle(runner)  # which rendering all of them would delay by half a minute


async def test_what_is_being_tokenised_waits(runner: TextRunner) -> None:
    calls = [asyncio.create_task(runner.tokenize(LOOPS)) for _ in range(2)]
    async with asyncio.timeout(60):
        while runner.health().waiting != 2:
            await asyncio.sleep(0.02)
    for call in calls:
        call.cancel()
    assert await is_idle(runner)


async def test_templates_that_loop_hurt_no_other_request(runner: TextRunner, folder: Path) -> None:
    looping = [asyncio.create_task(runner.submit(request(LOOPS))) for _ in range(2)]
    got = await collect(runner, "hello", max_new_tokens=6, ignore_eos=True)
    assert [ids_of(got)] == greedy(folder, ["hello"], 6)
    for error in await asyncio.gather(*looping, return_exceptions=True):
        assert isinstance(error, InvalidRequest)
        assert "chat template exceeded 2 s of CPU time" in error.message
    assert await is_idle(runner)


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
