"""The workload: seeded requests, the same for every server."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

PROMPT_TOKENS = (16, 256)
OUTPUT_TOKENS = (16, 128)
"""Minimum and maximum; sizes are uniformly distributed."""
SEED = 7


@dataclass(frozen=True)
class Request:
    """A greedy request of known size; `at` is its time in seconds after the start."""

    prompt: str
    prompt_tokens: int
    output_tokens: int
    at: float = 0.0


def closed_loop(words: Sequence[str], *, concurrency: int, count: int) -> list[Request]:
    """Requests for `concurrency` clients, each of which waits for its response.

    No two lists share a prompt, so a prefix cache is no advantage.
    """
    rng = _rng("closed", concurrency)
    return [_request(rng, words) for _ in range(count)]


def poisson(words: Sequence[str], *, rate: float, count: int) -> list[Request]:
    """Requests of a Poisson process with a mean of `rate` per second."""
    rng = _rng("poisson", rate)
    requests, at = [], 0.0
    for _ in range(count):
        requests.append(_request(rng, words, at))
        at += rng.expovariate(rate)
    return requests


def warm_up(words: Sequence[str], *, count: int) -> list[Request]:
    """Requests that make a server allocate its memory before it is measured."""
    rng = _rng("warm-up", count)
    return [sized(rng, words, 64, 8) for _ in range(count)]


def request_count(concurrency: int, *, per_client: float, extra: int) -> int:
    """Number of requests of a closed loop; more than clients, so that some wait for their turn."""
    return math.ceil(per_client * concurrency) + extra


def sized(
    rng: random.Random,
    words: Sequence[str],
    prompt_tokens: int,
    output_tokens: int,
    at: float = 0.0,
) -> Request:
    """A request of the given size; each word is one token."""
    prompt = "".join(rng.choices(words, k=prompt_tokens))
    return Request(prompt, prompt_tokens, output_tokens, at)


def _request(rng: random.Random, words: Sequence[str], at: float = 0.0) -> Request:
    return sized(rng, words, rng.randint(*PROMPT_TOKENS), rng.randint(*OUTPUT_TOKENS), at)


def _rng(*purpose: object) -> random.Random:
    return random.Random(repr((SEED, *purpose)))  # noqa: S311 - not cryptographic
