"""The cut of top-k, top-p and min-p: by torch, and by a kernel in Triton's interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.gpu_check.kernels import CUTOFFS, kept
from runners.text.gpu.kernels.cutoff import cutoff, cutoff_torch

by_kernel = partial(cutoff, in_interpreter=True)
INFINITY = float("inf")


def parameters(rows: list[tuple[int, float, float]]) -> tuple[torch.Tensor, ...]:
    top_k, top_p, min_p = zip(*rows, strict=True)
    return torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p), torch.tensor(min_p)


def random_rows(n: int, vocab: int, seed: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits from flat to peaked, some with ties and bans, and parameters of which some are off."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    logits = torch.randn(n, vocab, generator=generator) * (10 ** (2 * uniform(n, 1) - 1))
    logits[::3] = logits[::3].round()
    if vocab > 10:
        logits[1::4, ::5] = -INFINITY
    top_k = (uniform(n) ** 2 * (vocab + 3)).int() * (uniform(n) < 0.7)
    top_p = torch.where(uniform(n) < 0.7, uniform(n), 1.0)
    min_p = torch.where(uniform(n) < 0.5, uniform(n) ** 2, 0.0)
    return logits, (top_k, top_p, min_p)


def warped(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Which tokens of one row transformers keeps, in float64."""
    scores: Any = logits.double()[None]
    ids: Any = torch.zeros(1, 0, dtype=torch.int64)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    kept: torch.Tensor = scores[0] > -INFINITY
    return kept


@pytest.mark.parametrize("vocab", [1, 7, 50, 3000])
def test_it_keeps_what_transformers_keeps(vocab: int) -> None:
    logits, options = random_rows(200, vocab, seed=1)
    kept = (logits >= cutoff_torch(logits, *options)[:, None]) & (logits > -INFINITY)
    for row, mask, top_k, top_p, min_p in zip(logits, kept, *options, strict=True):
        expected = warped(row, int(top_k), float(top_p), float(min_p))
        lowest = row[expected].min()
        # Of tokens that tie, transformers' top-p keeps some, here all are kept.
        assert torch.equal(mask, row >= lowest), (top_k, top_p, min_p)


@pytest.mark.parametrize(("vocab", "seed"), [(1, 2), (7, 3), (50, 4), (5000, 5)])
def test_the_kernel_finds_the_same_cut(vocab: int, seed: int) -> None:
    logits, options = random_rows(6, vocab, seed)
    assert torch.equal(by_kernel(logits, *options), cutoff_torch(logits, *options))


def test_a_row_has_the_same_bits_alone() -> None:
    logits, options = random_rows(3, 300, seed=6)
    whole = by_kernel(logits, *options)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(by_kernel(logits[one], *(each[one] for each in options)), whole[one])


CASES = [
    # top_k, top_p, min_p, threshold; logits have probabilities of 0.5, 0.2, 0.2 and 0.1
    (0, 1.0, 0.0, -INFINITY),
    (4, 1.0, 0.0, -INFINITY),
    (2, 1.0, 0.0, 0.2),  # the third ties with the second
    (0, 0.4, 0.0, 0.5),
    (0, 0.6, 0.0, 0.2),
    (0, 0.95, 0.0, 0.1),
    (0, 0.0, 0.0, 0.5),
    (1, 0.9, 0.0, 0.5),  # of what top-k left
    (2, 0.56, 0.0, 0.2),  # 0.5 of 0.9 is less than 0.56
    (2, 0.55, 0.0, 0.5),  # and more than 0.55
    (0, 1.0, 1.0, 0.5),
    (0, 0.95, 0.3, 0.15),
]


@pytest.mark.parametrize("compute", [cutoff_torch, by_kernel], ids=["torch", "kernel"])
def test_the_definition(compute: partial[torch.Tensor]) -> None:
    logits = torch.tensor([0.2, 0.5, 0.1, 0.2]).log().repeat(len(CASES), 1)
    threshold = compute(logits, *parameters([(k, p, m) for k, p, m, _ in CASES]))
    expected = torch.tensor([t for *_, t in CASES])
    torch.testing.assert_close(threshold.exp(), expected.clamp_min(0), rtol=1e-5, atol=0)
    assert (threshold == -INFINITY).tolist() == [t == -INFINITY for *_, t in CASES]


@pytest.mark.parametrize("compute", [cutoff_torch, by_kernel], ids=["torch", "kernel"])
def test_odd_logits(compute: partial[torch.Tensor]) -> None:
    """Zeros of both signs are one value. Infinity is the best token, and a ban is none."""
    rows = torch.tensor(
        [
            [1.0, -0.0, 0.0, -6.0],
            [INFINITY, 1.0, 2.0, -INFINITY],
            [-INFINITY, -INFINITY, 3.0, -INFINITY],
            [-1.0, -2.0, -3e38, -1e-40],
        ]
    )
    threshold = compute(rows, *parameters([(2, 0.6, 0.0), (0, 0.5, 0.1), (2, 0.9, 0.2), (3, 1, 0)]))
    assert (rows >= threshold[:, None]).tolist() == [
        [True, True, True, False],
        [True, False, False, False],
        [False, False, True, False],
        [True, True, False, True],
    ]


def test_no_rows() -> None:
    empty = torch.zeros(0, 9)
    for compute in (cutoff_torch, by_kernel):
        assert compute(empty, *(torch.zeros(0) for _ in range(3))).shape == (0,)


def test_the_reference_of_cutoffs_keeps_what_transformers_keeps() -> None:
    torch.manual_seed(0)
    row = 3 * torch.randn(200)
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    warpers: list[Any] = [TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]
    for case in CUTOFFS:
        scores: Any = row[None].clone()
        for warper, value, neutral in zip(warpers, case, (0, 1.0, 0.0), strict=True):
            if value != neutral:
                scores = warper(value)(ids, scores)
        assert torch.equal(kept(row, *case), scores[0] > float("-inf")), case
