"""The sampler of the device chooses the tokens of the host's, here on CPU tensors."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from typing_extensions import override

from runners.contracts.text import SamplingParams
from runners.hf.models import SamplingDefaults
from runners.text.distribution import cutoff_of_best, draw, invert, rank, weights
from runners.text.gpu.kernels.cutoff import cutoff
from runners.text.gpu.sampling import DeviceSampler
from runners.text.samplers import SampledStep
from runners.text.sampling import RankedToken, SamplerState, sample

CPU = torch.device("cpu")
STEPS = 4
BATCHES = 250
STATES = 4
"""Per batch: a thousand parameter sets in all."""
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
"""Operators that wait for a device."""


def state(eos: Sequence[int] = (), prompt: Sequence[int] = (0,), **params: Any) -> SamplerState:
    return SamplerState(SamplingParams(**params), SamplingDefaults(), prompt, frozenset(eos))


def random_logits(rng: random.Random, rows: int, vocab_size: int) -> torch.Tensor:
    """Flat, ordinary, peaked, with ties, or all equal."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = torch.randn(rows, vocab_size, generator=generator)
    match rng.randrange(6):
        case 0:
            return logits * 0.01
        case 1:
            return logits * 20
        case 2:
            return (logits * 3).round() / 2
        case 3:
            return (logits * 3).bfloat16()
        case 4:
            return torch.full_like(logits, rng.uniform(-5, 5))
        case _:
            return logits * 3


def random_params(rng: random.Random, vocab_size: int) -> dict[str, Any]:
    """A value for each parameter, which is neutral at least half of the time."""

    def maybe(value: Any, neutral: Any) -> Any:
        return value if rng.random() < 0.4 else neutral

    ids = rng.sample(range(vocab_size), min(vocab_size, rng.randrange(1, 20)))
    return {
        "seed": rng.getrandbits(64),
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": maybe(rng.choice([1, 2, 7, 400, 511, 512, 513, 900, 5000]), 0),
        "top_p": maybe(rng.choice([0.0, 0.05, 0.5, 0.9, 0.999]), 1.0),
        "min_p": maybe(rng.choice([1e-6, 0.05, 0.5, 1.0]), 0.0),
        "repetition_penalty": maybe(rng.choice([0.7, 1.3, 5.0]), 1.0),
        "presence_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "frequency_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "logit_bias": maybe({token: rng.uniform(-9, 9) for token in ids}, None),
        "min_new_tokens": maybe(2, 0),
        "logprobs": maybe(rng.choice([0, 1, 5]), None),
    }


def random_states(rng: random.Random, vocab_size: int) -> list[tuple[SamplerState, SamplerState]]:
    """Pairs of equal states."""
    pairs = []
    for _ in range(STATES):
        params = random_params(rng, vocab_size)
        prompt = rng.choices(range(vocab_size), k=rng.randrange(1, 9))
        eos = rng.sample(range(vocab_size), rng.randrange(min(3, vocab_size)))
        pairs.append((state(eos, prompt, **params), state(eos, prompt, **params)))
    return pairs


def same_ranks(ours: Sequence[RankedToken | None], theirs: Sequence[RankedToken | None]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            values = [value for _, value in other.top]
            assert [value for _, value in one.top] == pytest.approx(values, abs=1e-6)


def results(step: SampledStep) -> tuple[list[int | None], list[RankedToken | None]]:
    """The tokens of a step, None for rows of NaN, and their log-probabilities."""
    rows = step.result()
    assert all((row.token is None) == (row.error is not None) for row in rows)
    return [row.token for row in rows], [row.ranked for row in rows]


@pytest.mark.parametrize("part", range(5))
def test_a_thousand_parameter_sets_give_the_tokens_of_the_host(part: int) -> None:
    """Each step is launched before the host knows the tokens of the one before it."""
    rng = random.Random(part)
    for _ in range(BATCHES // 5):
        vocab_size = rng.choice([1, 2, 6, 50, 700, 3000])
        pairs = random_states(rng, vocab_size)
        host, device = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        sampler = DeviceSampler(CPU, vocab_size)
        in_flight = None
        for index in range(STEPS):
            logits = random_logits(rng, STATES, vocab_size)
            want, want_ranked = sample(logits.float(), host)
            before = logits.clone()
            step = sampler.launch(logits, device, [index] * STATES)
            assert torch.equal(logits, before)
            if in_flight is not None:
                for each, token in zip(device, results(in_flight)[0], strict=True):
                    assert token is not None
                    each.record(token)
            tokens, ranked = results(step)
            params = [vars(each) for each in device]
            assert tokens == want, params
            assert step.tokens.tolist() == want
            same_ranks(ranked, want_ranked)
            in_flight = step


def test_a_row_has_the_same_token_alone_and_in_any_batch() -> None:
    rng = random.Random(0)
    for _ in range(40):
        vocab_size = rng.choice([6, 50, 3000])
        pairs = random_states(rng, vocab_size)
        alone = [DeviceSampler(CPU, vocab_size) for _ in pairs]
        together = DeviceSampler(CPU, vocab_size)
        for index in range(STEPS):
            logits = random_logits(rng, STATES, vocab_size)
            step = together.launch(logits, [batch for batch, _ in pairs], [index] * STATES)
            tokens, ranked = results(step)
            for i, (batch, single) in enumerate(pairs):
                own = alone[i].launch(logits[i : i + 1], [single], [index])
                assert results(own) == ([tokens[i]], [ranked[i]])
                assert tokens[i] is not None
                batch.record(tokens[i] or 0)
                single.record(tokens[i] or 0)


def test_a_step_that_was_discarded_is_sampled_again_with_the_same_result() -> None:
    """After a preemption the host takes back steps that the device has counted."""
    vocab_size = 40
    params: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 3,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.2,
    }
    rows = [random_logits(random.Random(i), 1, vocab_size) for i in range(8)]
    reference = state(**params)
    want = [sample(row.float(), [reference])[0][0] for row in rows]
    discarded = state(**params)
    sampler = DeviceSampler(CPU, vocab_size)
    for index, row in enumerate(rows):
        for launched in (rows[7], row):  # the first has other logits, so it counts another token
            step = sampler.launch(launched, [discarded], [index])
            if index < 7:
                sampler.launch(rows[6], [discarded], [index + 1])
        token = results(step)[0][0]
        assert token == want[index]
        discarded.record(token)


def test_a_step_cannot_run_ahead_of_what_the_device_has_counted() -> None:
    sampler = DeviceSampler(CPU, 8)
    with pytest.raises(ValueError, match="output token 1 cannot be sampled: 0 tokens are known"):
        sampler.launch(torch.zeros(1, 8), [state(presence_penalty=1.0)], [1])
    with pytest.raises(ValueError, match="logits of shape"):
        sampler.launch(torch.zeros(1, 9), [state()], [0])


def test_rows_with_nan_are_named_and_leave_the_others_alone() -> None:
    sampler = DeviceSampler(CPU, 8)
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 1}]
    clean = [results(sampler.launch(logits, [state(**p, logprobs=2)] * 4, [0] * 4)) for p in kinds]
    logits[2, 5] = float("nan")
    for params, (tokens, ranked) in zip(kinds, clean, strict=True):
        step = sampler.launch(logits, [state(**params, logprobs=2)] * 4, [0] * 4)
        assert results(step) == (
            [*tokens[:2], None, tokens[3]],
            [*ranked[:2], None, ranked[3]],
        )
        assert step.tokens.min() >= 0
        assert step.tokens.max() < 8


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_infinite_logits_give_the_first_best_token(value: float, params: dict[str, Any]) -> None:
    logits = torch.zeros(1, 8)
    logits[0, 3:5] = float("inf")
    logits = logits if value > 0 else torch.full((1, 8), value)
    best = 3 if value > 0 else 0
    sampled = {"temperature": 1.0, "seed": 0, **params}
    assert sample(logits, [state(**sampled)])[0] == [best]
    step = DeviceSampler(CPU, 8).launch(logits, [state(**sampled)], [0])
    assert results(step)[0] == [best]


def test_the_counts_of_sequences_that_are_gone_are_used_again() -> None:
    """All tokens tie, so the first that was not sampled before comes next."""
    sampler = DeviceSampler(CPU, 16)
    logits = torch.zeros(20, 16)

    def sampled(states: Sequence[SamplerState], index: int) -> list[int]:
        count = len(states)
        return sampler.launch(logits[:count], states, [index] * count).tokens.tolist()

    for _ in range(3):
        states = [state(presence_penalty=1.0) for _ in range(20)]
        # The tables grow while some sequences run.
        assert [sampled(states[:6], index) for index in range(3)] == [[i] * 6 for i in range(3)]
        assert sampled(states[6:], 0) == [0] * 14
        assert sampled(states[:6], 3) == [3] * 6
        assert sampled(states[6:], 1) == [1] * 14
        del states
        gc.collect()
    assert len(sampler._counts.output) == 32
    # Its predecessor had as many tokens, and others.
    states = [state(presence_penalty=1.0) for _ in range(20)]
    for each in states:
        for token in (0, 9, 9, 0):
            each.record(token)
    assert sampled(states, 4) == [1] * 20


def test_sequences_without_penalties_are_not_counted() -> None:
    sampler = DeviceSampler(CPU, 16)
    sampled = state(temperature=1.0, min_new_tokens=5, eos=[3], logit_bias={4: 1.0})
    sampler.launch(torch.zeros(1, 16), [sampled], [0])
    assert len(sampler._counts.output) == 0


def test_a_launch_never_waits_for_the_device() -> None:
    seen: set[str] = set()

    class Recorder(TorchDispatchMode):
        @override
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name == "index":  # a mask is turned into indices, whose number the host waits for
                assert all(i is None or i.dtype == torch.int64 for i in args[1])
            seen.add(name)
            return func(*args, **kwargs or {})

    rng = random.Random(0)
    sampler = DeviceSampler(CPU, 50)
    for _ in range(50):
        states = [each for each, _ in random_states(rng, 50)]
        with Recorder():
            sampler.launch(random_logits(rng, STATES, 50), states, [0] * STATES)
    assert {"argmax", "searchsorted", "scatter_add_", "index_fill_", "topk"} <= seen
    assert not seen & WAITS


def test_only_what_a_step_needs_is_computed() -> None:
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        @override
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    with Recorder():
        DeviceSampler(CPU, 50).launch(
            torch.zeros(4, 50, dtype=torch.bfloat16), [state()] * 4, [9] * 4
        )
    assert "argmax" in seen
    assert not {"to", "_to_copy", "exp_", "sort", "index", "_log_softmax"} & set(seen)


def kept(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Which tokens transformers keeps."""
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    if min_p:
        warper: Any = MinPLogitsWarper(min_p)
        logits = warper(None, logits)
    return logits.isfinite()


@pytest.mark.parametrize("vocab_size", [3, 40, 3000])
def test_the_kept_tokens_are_those_of_transformers(vocab_size: int) -> None:
    """On distinct logits: of tokens that tie at the cut of top-p, they keep any."""
    rng = random.Random(vocab_size)
    for _ in range(60):
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        logits = torch.randn(1, vocab_size, generator=generator) * rng.choice([0.3, 1.0, 4.0])
        top_k = rng.choice([0, 1, 2, 30, 600, 2999])
        top_p = rng.choice([1.0, 0.3, 0.9, 0.99])
        min_p = rng.choice([0.0, 0.02, 0.4, 1.0])
        limits = (
            torch.tensor([top_k]),
            torch.tensor([top_p]),
            torch.tensor([min_p]),
        )
        want = kept(logits, top_k, top_p, min_p)
        threshold = cutoff(logits, limits[0].int(), *limits[1:])
        assert torch.equal(logits >= threshold[:, None], want)
        total = weights(logits, logits.amax(-1, keepdim=True)).sum(-1)
        for candidates in (vocab_size, min(vocab_size, 512), min(vocab_size, 20)):
            best = logits.topk(candidates).values
            threshold, complete = cutoff_of_best(best, vocab_size, *limits, total)
            if complete:
                assert torch.equal(logits >= threshold[:, None], want)
            elif not min_p and not (candidates <= top_k < vocab_size and top_p < 1):
                assert want.sum() >= candidates
        assert cutoff_of_best(logits.sort(-1, descending=True).values, vocab_size, *limits, total)[
            1
        ]


@pytest.mark.parametrize(
    "params",
    [{"min_p": 0.2}, {"top_p": 0.7}, {"top_k": 5}, {"top_k": 9, "top_p": 0.8, "min_p": 0.15}, {}],
)
def test_draws_follow_the_exact_probabilities(params: dict[str, Any]) -> None:
    """Evenly spaced uniform numbers draw each token as often as it is probable."""
    count, vocab_size = 20_000, 30
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1))
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    keeps = kept(logits, **neutral)
    expected = logits.masked_fill(~keeps, float("-inf")).double().softmax(-1)[0]
    states = [state(temperature=1.0, **params) for _ in range(count)]
    for i, each in enumerate(states):
        each._uniforms.append((i + 0.5) / count)
    step = DeviceSampler(CPU, vocab_size).launch(logits.expand(count, -1), states, [0] * count)
    seen = torch.bincount(step.tokens, minlength=vocab_size) / count
    assert (seen[~keeps[0]] == 0).all()
    assert (seen - expected).abs().max() < 2 / count


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_uniform_number_at_an_end_draws_a_token_that_is_kept(uniform: float) -> None:
    for vocab_size in (1, 7, 50_000):
        logits = torch.zeros(1, vocab_size)
        number = torch.tensor([uniform], dtype=torch.float64)
        last = vocab_size - 1 if uniform else 0
        assert draw(logits, torch.tensor([0]), number).tolist() == [last]
        logits[0, last] = float("-inf")
        if vocab_size > 1:
            want = [last - 1 if uniform else 1]
            assert draw(logits, logits.argmax(-1), number).tolist() == want
    for seed in range(50):
        amounts = torch.randint(1, 2**62, (1, 1), generator=torch.Generator().manual_seed(seed))
        total = torch.cat([amounts, torch.zeros(1, 1, dtype=torch.int64)], -1)
        assert invert(total, number).tolist() == [0]


def test_equally_likely_alternatives_are_listed_by_id() -> None:
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, 0.0, -1.0]])
    _, ids, values = rank(logits, torch.tensor([5]), 4)
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert values[0, 0] == values[0, 1]
