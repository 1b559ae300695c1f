"""The scheduler on a real model: admission, preemption, shared prefixes, aborts, chunks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from runners.contracts.text import SamplingParams
from tests.support.models import greedy
from tests.support.scheduling import COUNT, Run, load, sequence

PROMPTS = [[5, 6, 7], [9] * 30, [11], list(range(20, 70))]
BLOCK = 32


@pytest.fixture(params=["auto", "torch"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The attention kernel: that of a CPU, or one of the path of a GPU, on which steps overlap."""
    return str(request.param)


def test_one_failing_sampler_ends_its_own_sequence_only(llama: Path) -> None:
    run = Run(load(llama))
    good, bad = sequence("good", PROMPTS[0]), sequence("bad", PROMPTS[1])
    bad.sampler.min_new_tokens = 5
    bad.sampler.eos_ids = [10**6]
    for each in (good, bad):
        run.scheduler.add(each)
    run.drain()
    assert run.failed == [("bad", IndexError)]
    assert run.tokens["good"] == greedy(llama, PROMPTS[:1], COUNT)[0]
    assert run.scheduler.kv_used == 0


def test_kv_is_never_exceeded_and_what_does_not_fit_waits(llama: Path, kernel: str) -> None:
    run = Run(load(llama, attention_kernel=kernel, kv_tokens=3 * BLOCK))
    for i, prompt in enumerate(PROMPTS):
        run.scheduler.add(sequence(str(i), prompt))
    run.drain()
    assert 0 < run.peak <= 3 * BLOCK
    assert run.scheduler.kv_used == 0
    assert run.finished[-1] == "3"  # two blocks: waits until the others left
    assert run.tokens == {str(i): ids for i, ids in enumerate(greedy(llama, PROMPTS, COUNT))}


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_sequences_lose_no_token(llama: Path, prefix_caching: bool, kernel: str) -> None:
    """Six sequences that grow to three blocks each, in seven blocks."""
    prompts = [[10 + i] * (5 + i) for i in range(6)]
    engine = load(
        llama, kv_tokens=7 * BLOCK, prefix_caching=prefix_caching, attention_kernel=kernel
    )
    run = Run(engine)
    for i, prompt in enumerate(prompts):
        run.scheduler.add(sequence(str(i), prompt, 75))
    run.drain()
    assert run.scheduler.preemptions > 0
    assert run.peak <= 7 * BLOCK
    assert run.tokens == {str(i): ids for i, ids in enumerate(greedy(llama, prompts, 75))}
    # The oldest is never the one that gives way.
    assert run.finished[0] == "0"


def test_a_preempted_seeded_sequence_draws_the_same_tokens(llama: Path, kernel: str) -> None:
    def tokens(kv_tokens: int) -> tuple[dict[str, list[int]], int]:
        run = Run(load(llama, attention_kernel=kernel, kv_tokens=kv_tokens))
        for i in range(5):
            params = SamplingParams(temperature=1.0, seed=i)
            run.scheduler.add(sequence(str(i), [10 + i] * 6, 60, params))
        run.drain()
        return run.tokens, run.scheduler.preemptions

    roomy, none = tokens(4096)
    tight, some = tokens(6 * BLOCK)
    assert none == 0 < some
    assert tight == roomy


def test_many_mixed_requests_in_little_kv_all_finish(llama: Path, kernel: str) -> None:
    draw = random.Random(0)
    run = Run(
        load(llama, attention_kernel=kernel, kv_tokens=8 * BLOCK),
        max_batch_size=32,
        max_step_tokens=64,
    )
    wanted = {}
    for i in range(64):
        prompt = [draw.randrange(300) for _ in range(draw.randrange(1, 100))]
        wanted[str(i)] = draw.randrange(1, 60)
        run.scheduler.add(sequence(str(i), prompt, wanted[str(i)]))
    run.drain()
    assert {name: len(tokens) for name, tokens in run.tokens.items()} == wanted
    assert run.peak <= 8 * BLOCK
    assert run.scheduler.kv_used == 0


def test_equal_prompt_heads_are_computed_once(llama: Path, kernel: str) -> None:
    head = [i % 250 for i in range(70)]
    prompts = [[*head, 251], [*head, 252, 253], head[:40] + [254] * 30]
    run = Run(load(llama, attention_kernel=kernel), max_step_tokens=512)
    fed: list[int] = []
    submit = run.engine.submit

    def counting(rows):  # type: ignore[no-untyped-def]
        fed.append(sum(len(row.tokens) for row in rows))
        return submit(rows)

    run.engine.submit = counting  # type: ignore[method-assign]
    first_steps = []
    for i, prompt in enumerate(prompts):
        run.scheduler.add(sequence(str(i), prompt))
        run.step()
        first_steps.append(fed[-1])
        run.drain()
    assert first_steps == [71, 72 - 64, 70 - 32]
    assert run.tokens == {str(i): ids for i, ids in enumerate(greedy(llama, prompts, COUNT))}


def test_a_chat_that_goes_on_finds_its_own_answer(llama: Path) -> None:
    run = Run(load(llama))
    prompt = [7] * 40
    run.scheduler.add(sequence("turn", prompt, 30))
    run.drain()
    more = prompt + run.tokens["turn"] + [3, 4]
    again = sequence("again", more)
    run.scheduler.add(again)
    run.step()
    assert again.num_computed >= 2 * BLOCK
    run.drain()
    assert run.tokens["again"] == greedy(llama, [more], COUNT)[0]


def test_a_long_prompt_does_not_stall_running_sequences(llama: Path) -> None:
    run = Run(load(llama), max_step_tokens=8)
    run.scheduler.add(sequence("short", [5, 6, 7], 40))
    run.step()
    run.scheduler.add(sequence("long", [8] * 100, 4))
    for steps in range(1, 12):
        run.step()
        assert len(run.tokens["short"]) == 1 + steps
    assert "long" not in run.tokens


def test_abort_frees_kv_within_the_step_also_while_waiting(llama: Path) -> None:
    run = Run(load(llama), max_batch_size=1)
    run.scheduler.add(sequence("first", [5, 6, 7], 40))
    run.scheduler.add(sequence("second", [5, 6, 7], 4))
    run.step()
    assert (run.scheduler.running, run.scheduler.waiting) == (1, 1)
    run.scheduler.abort("first")
    assert run.scheduler.kv_used == 0
    run.scheduler.abort("nobody")
    run.step()
    assert (run.scheduler.running, run.scheduler.waiting) == (1, 0)
    run.scheduler.abort("second")
    assert not run.scheduler.busy
    assert "second" not in run.finished
