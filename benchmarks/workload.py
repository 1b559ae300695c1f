"""What is asked of every server: seeded requests, the same for each."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

PROMPT_TOKENS = (16, 256)
OUTPUT_TOKENS = (16, 128)
"""Shortest and longest, evenly distributed."""
SEED = 7


@dataclass(frozen=True)
class Request:
    """One greedy request of known size; `at` is its arrival in seconds after the start."""

    prompt: str
    prompt_tokens: int
    output_tokens: int
    at: float = 0.0


def closed_loop(words: Sequence[str], *, concurrency: int, count: int) -> list[Request]:
    """A list worked off by `concurrency` clients, each of which waits for its answer.

    No two lists share a prompt, so no server gains from having seen one before.
    """
    rng = _rng("closed", concurrency)
    return [_request(rng, words) for _ in range(count)]


def poisson(words: Sequence[str], *, rate: float, count: int) -> list[Request]:
    """Requests that arrive independently of one another, `rate` a second on average."""
    rng = _rng("poisson", rate)
    requests, at = [], 0.0
    for _ in range(count):
        requests.append(_request(rng, words, at))
        at += rng.expovariate(rate)
    return requests


def warm_up(words: Sequence[str], *, count: int) -> list[Request]:
    """Requests that make a server touch its memory before it is measured."""
    rng = _rng("warm-up", count)
    return [sized(rng, words, 64, 8) for _ in range(count)]


def request_count(concurrency: int, *, per_client: float, extra: int) -> int:
    """How many requests a closed loop has: more than clients, so that some follow the first."""
    return math.ceil(per_client * concurrency) + extra


def sized(
    rng: random.Random,
    words: Sequence[str],
    prompt_tokens: int,
    output_tokens: int,
    at: float = 0.0,
) -> Request:
    """A request of a chosen size; each word is one token."""
    prompt = "".join(rng.choices(words, k=prompt_tokens))
    return Request(prompt, prompt_tokens, output_tokens, at)


def _request(rng: random.Random, words: Sequence[str], at: float = 0.0) -> Request:
    return sized(rng, words, rng.randint(*PROMPT_TOKENS), rng.randint(*OUTPUT_TOKENS), at)


def _rng(*purpose: object) -> random.Random:
    return random.Random(repr((SEED, *purpose)))  # noqa: S311 - a workload is no secret
