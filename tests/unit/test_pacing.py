"""The prefill budget's arithmetic, on steps whose cost is known."""

from __future__ import annotations

import pytest

from runners.text.prefill_budget import MIN_CHUNK, SHARE, PrefillBudget


def cost(decoding: int, prompt_tokens: int, *, decode: float, token: float) -> float:
    return (decode if decoding else 0.0) + token * prompt_tokens


@pytest.mark.parametrize("token", [0.0001, 0.001, 0.003])
def test_chunks_settle_where_a_prompt_adds_its_share(token: float) -> None:
    budget, decode = PrefillBudget(), 0.1
    budget.observe(8, 0, decode)
    for _ in range(50):
        chunk = budget.tokens(8, 1, 4096)
        budget.observe(8, chunk, cost(8, chunk, decode=decode, token=token))
    assert budget.tokens(8, 1, 4096) == pytest.approx(SHARE * decode / token, rel=0.05)


def test_alone_a_prompt_takes_the_whole_step() -> None:
    budget = PrefillBudget()
    budget.observe(4, 0, 0.01)
    budget.observe(4, 10, 1.0)
    assert budget.tokens(0, 1, 512) == 512


def test_the_bounds_hold_whatever_was_seen() -> None:
    budget = PrefillBudget()
    assert budget.tokens(3, 1, 16) <= 13
    budget.observe(3, 0, 0.001)
    budget.observe(3, 16, 10.0)
    assert budget.tokens(3, 1, 512) == MIN_CHUNK
    assert budget.tokens(512, 1, 512) == 1
    for _ in range(30):
        budget.observe(3, 100, 0.001)
    assert budget.tokens(3, 1, 512) <= 509


def test_many_prompts_do_not_wait_for_one_another() -> None:
    budget = PrefillBudget()
    budget.observe(8, 0, 0.1)
    budget.observe(0, 100, 0.1)
    assert budget.tokens(8, 6, 4096) == pytest.approx(6 * budget.tokens(8, 1, 4096), abs=6)


def test_one_stalled_step_teaches_nothing() -> None:
    budget = PrefillBudget()
    for seconds in (0.1, 0.1, 5.0, 0.1):
        budget.observe(8, 0, seconds)
    for seconds in (0.15, 3.0, 0.15):
        budget.observe(8, 50, seconds)
    assert budget.tokens(8, 1, 4096) == pytest.approx(SHARE * 0.1 / 0.001, abs=1)


def test_prompts_that_grow_dearer_are_read_in_smaller_chunks() -> None:
    budget = PrefillBudget()
    budget.observe(8, 0, 0.1)
    chunks: list[int] = []
    longest = 0.0
    for context in range(100):
        chunk = budget.tokens(8, 1, 4096)
        seconds = cost(8, chunk, decode=0.1, token=0.001 * (1 + context / 50))
        longest = max(longest, seconds) if chunks else longest
        budget.observe(8, chunk, seconds)
        chunks.append(chunk)
    assert chunks[-1] < chunks[3]
    assert longest <= 1.2 * (1 + SHARE) * 0.1
