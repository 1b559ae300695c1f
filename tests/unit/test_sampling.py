"""Sampling follows transformers' processors, and a seed means the same in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runners.contracts.text import SamplingParams
from runners.hf.models import SamplingDefaults
from runners.text.sampling import SamplerState, sample

VOCAB = 50
PROMPT = [3, 4, 5, 3]


def state(defaults: SamplingDefaults | None = None, **params: Any) -> SamplerState:
    return SamplerState(
        SamplingParams(**params), defaults or SamplingDefaults(), PROMPT, frozenset({1})
    )


def logits(rows: int = 1, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def draws(count: int, row: torch.Tensor, **params: Any) -> torch.Tensor:
    """Frequencies of each token over `count` draws from one distribution."""
    states = [state(seed=i, **params) for i in range(count)]
    tokens, _ = sample(row.expand(count, -1), states)
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB) / count


def test_greedy_is_the_default_and_is_argmax() -> None:
    rows = logits(4)
    assert sample(rows, [state() for _ in range(4)])[0] == rows.argmax(-1).tolist()


def test_the_models_own_defaults_apply_where_the_request_says_nothing() -> None:
    own = SamplingDefaults(temperature=0.7, top_k=1)
    assert state(own).temperature == 0.7
    assert state(own).top_k == 1
    assert state(own, temperature=0.0, top_k=5).temperature == 0.0
    assert state(own, temperature=0.0, top_k=5).top_k == 5
    assert state(SamplingDefaults(min_p=0.1)).min_p == 0.1
    assert state(SamplingDefaults(min_p=0.1), min_p=0.0).min_p == 0.0


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch() -> None:
    rows = logits(3, spread=0.5)
    alone = state(temperature=1.0, seed=5)
    batch = [state(temperature=0.9, seed=8), state(temperature=1.0, seed=5), state(top_p=0.4)]
    for _ in range(8):
        assert sample(rows, batch)[0][1] == sample(rows[1:2], [alone])[0][0]


def test_seeds_differ_and_huge_or_negative_ones_work() -> None:
    row = logits()
    tokens = {
        sample(row, [state(temperature=3.0, seed=seed)])[0][0]
        for seed in [*range(20), -1, 2**63, 2**80]
    }
    assert len(tokens) > 3


@pytest.mark.parametrize("seed", [5, None])
def test_the_number_of_a_token_is_the_same_however_often_it_is_asked_for(seed: int | None) -> None:
    numbers = state(seed=seed)
    last = numbers.uniform(39)
    first = [numbers.uniform(i) for i in range(40)]
    assert [numbers.uniform(i) for i in range(40)] == first
    assert first[39] == last
    assert len(set(first)) == 40
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        assert first == [
            torch.rand(1, dtype=torch.float64, generator=generator).item() for _ in range(40)
        ]


@pytest.mark.parametrize("params", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_the_tokens_are_drawn_in_the_order_of_their_ids(
    params: dict[str, Any], spread: float
) -> None:
    """The first whose cumulative probability exceeds the number, whatever a sort puts first."""
    row = logits(spread=spread)
    kept = row.double()
    warpers: tuple[Any, ...] = (
        TopKLogitsWarper(params.get("top_k", VOCAB)),
        TopPLogitsWarper(params.get("top_p", 1.0)),
        MinPLogitsWarper(params.get("min_p", 0.0)),
    )
    for warper in warpers:
        kept = warper(None, kept)
    cumulative = kept.softmax(-1)[0].cumsum(-1)
    states = [state(temperature=1.0, seed=i, **params) for i in range(200)]
    expected = [int((cumulative <= each.uniform(0)).sum()) for each in states]
    assert sample(row.expand(200, -1), states)[0] == expected


@pytest.mark.parametrize("vocab_size", [8, 600])
@pytest.mark.parametrize(
    "params",
    [{"top_k": 1}, {"top_k": 4}, {"top_p": 0.01}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0}],
)
def test_tokens_that_tie_at_the_cut_are_kept(vocab_size: int, params: dict[str, Any]) -> None:
    row = torch.ones(1, vocab_size)
    row[0, ::2] = 2.0
    best = vocab_size // 2
    states = [state(temperature=1.0, **params) for _ in range(best)]
    for i, each in enumerate(states):
        each._uniforms.append((i + 0.5) / best)
    tokens, _ = sample(row.expand(best, -1), states)
    assert tokens == list(range(0, vocab_size, 2))


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 0.05}, TopPLogitsWarper(0.05)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_draws_follow_the_truncated_distribution(params: dict[str, Any], warper: Any) -> None:
    row = logits(spread=1.0)
    expected = warper(None, row.clone()).softmax(-1)[0]
    seen = draws(20_000, row, temperature=1.0, **params)
    assert (seen[expected == 0] == 0).all()
    assert (seen - expected).abs().max() < 0.02


@pytest.mark.parametrize("top_k", [0, 3, 700, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_flat_distributions_are_cut_as_transformers_cuts_them(top_k: int, top_p: float) -> None:
    """Their cut may lie beyond the candidates that are looked at first."""
    if not top_k and top_p == 1.0:
        return
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0)) * 0.3
    kept = logits
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    allowed = set(kept[0].isfinite().nonzero().flatten().tolist())
    states = [state(temperature=1.0, top_k=top_k, top_p=top_p, seed=i) for i in range(3000)]
    drawn, _ = sample(logits.expand(3000, -1), states)
    assert set(drawn) <= allowed
    best = set(logits[0].topk(min(512, len(allowed))).indices.tolist())
    share = sum(token not in best for token in drawn) / len(drawn)
    expected = float(kept.softmax(-1)[0][sorted(allowed - best)].sum())
    assert share == pytest.approx(expected, abs=0.04)


def test_temperature_scales_the_distribution() -> None:
    row = logits()
    seen = draws(20_000, row, temperature=2.0)
    assert (seen - (row / 2.0).softmax(-1)[0]).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [1e-40, 1e-10])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    rows = logits(4)
    states = [state(temperature=temperature, seed=i) for i in range(4)]
    assert sample(rows, states)[0] == rows.argmax(-1).tolist()


def test_repetition_penalty_is_that_of_transformers() -> None:
    row = logits()
    ours = row.clone()
    penalised = state(repetition_penalty=1.7)
    for token in (10, 11, 10):
        penalised.record(token)
    penalised.adjust(ours[0])
    seen = torch.tensor([[*PROMPT, 10, 11, 10]])
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(seen, row.clone())
    torch.testing.assert_close(ours, theirs)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    row = logits()
    ours = row.clone()
    penalised = state(presence_penalty=0.5, frequency_penalty=0.25)
    for token in (10, 11, 10):
        penalised.record(token)
    penalised.adjust(ours[0])
    expected = row.clone()
    expected[0, 10] -= 0.5 + 2 * 0.25
    expected[0, 11] -= 0.5 + 0.25
    torch.testing.assert_close(ours, expected)


def test_end_tokens_are_banned_before_min_new_tokens_exactly() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 1] = 9.0
    patient = state(min_new_tokens=2)
    tokens = [sample(row, [patient])[0][0] for _ in range(3)]
    assert tokens[0] != 1
    assert tokens[1] != 1
    assert tokens[2] == 1
    theirs = MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, [1])
    assert theirs(torch.tensor([[*PROMPT, 7, 7]]), row.clone()).argmax() == 1


def test_a_bias_is_added_after_the_penalties_and_before_the_ban() -> None:
    row = logits()
    biased = state(repetition_penalty=2.0, logit_bias={3: 4.0, 7: -100.0, 1: 9.0}, min_new_tokens=1)
    ours = row.clone()
    biased.adjust(ours[0])
    expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([PROMPT]), row.clone())
    expected[0, 3] += 4.0
    expected[0, 7] -= 100.0
    expected[0, 1] = float("-inf")
    torch.testing.assert_close(ours, expected)
    assert sample(row, [state(logit_bias={9: 100.0})])[0] == [9]


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    row = logits()
    changes: dict[str, Any] = {"repetition_penalty": 2.0, "logit_bias": {3: 9.0}, "min_p": 0.2}
    tokens, ranked = sample(row, [state(temperature=0.3, seed=1, **changes, logprobs=3)])
    expected = row[0].log_softmax(-1)
    assert ranked[0] is not None
    assert ranked[0].logprob == pytest.approx(float(expected[tokens[0]]))
    values, ids = expected.topk(3)
    assert [t for t, _ in ranked[0].top] == ids.tolist()
    assert [p for _, p in ranked[0].top] == pytest.approx(values.tolist())
    assert sample(row, [state(logprobs=0)])[1][0] is not None
    assert sample(row, [state()])[1][0] is None


def test_one_rows_penalties_leave_the_other_rows_alone() -> None:
    rows = logits(2)
    before = rows.clone()
    tokens, _ = sample(rows, [state(), state(repetition_penalty=5.0, min_new_tokens=3)])
    assert tokens[0] == int(before[0].argmax())
    torch.testing.assert_close(rows, before)
