"""Sampling on the host: from logits to tokens, each sequence with its parameters.

Order and meaning follow transformers' `generate`: penalties, the bias and the ban of end tokens on
the logits, then temperature, top-k, top-p, min-p. Each token takes one uniform number. A sequence
with a seed draws it from a generator that no other sequence uses, so a seed gives the same tokens
in any batch. `gpu.sampling` samples the same tokens on a device.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from random import SystemRandom

import numpy as np
import torch

from runners.contracts.text import SamplingParams
from runners.hf.models import SamplingDefaults
from runners.text.distribution import cutoff_of_best, draw, invert, rank, weights

CANDIDATES = 512
"""Best tokens among which the cut is looked for first. Sorting a whole vocabulary takes longer
than a step of a small model, so only rows that need more candidates are sorted whole."""
UNIFORMS = 16
"""Numbers that a generator makes at once, the same as one by one."""

_random = SystemRandom()


class SamplerState:
    """The sampling parameters of one sequence, with defaults filled in, and its token counts."""

    def __init__(
        self,
        params: SamplingParams,
        defaults: SamplingDefaults,
        prompt_ids: Sequence[int],
        eos_ids: frozenset[int],
    ) -> None:
        def resolve(value: float | None, default: float) -> float:
            return default if value is None else value

        temperature = resolve(params.temperature, resolve(defaults.temperature, 0.0))
        # Division by less overflows float32. The distribution is all on the best token by then.
        self.temperature = temperature if temperature >= 1e-5 else 0.0
        self.top_p = resolve(params.top_p, defaults.top_p)
        self.top_k = int(resolve(params.top_k, defaults.top_k))
        self.min_p = resolve(params.min_p, defaults.min_p)
        self.repetition_penalty = resolve(params.repetition_penalty, defaults.repetition_penalty)
        self.presence_penalty = params.presence_penalty
        self.frequency_penalty = params.frequency_penalty
        self.logit_bias = dict(params.logit_bias or {})
        self.min_new_tokens = int(resolve(params.min_new_tokens, defaults.min_new_tokens))
        self.logprobs = params.logprobs
        self.eos_ids = sorted(eos_ids)
        self.output_tokens = 0
        self.prompt_ids = list(set(prompt_ids))
        """The tokens of the prompt, each once."""
        self.output_counts: dict[int, int] = {}
        """How often each token was sampled."""
        self._uniforms = array("d")
        self._generator: torch.Generator | None = None
        if params.seed is not None:
            # torch takes 64 bits; larger and negative seeds are folded into them.
            self._generator = torch.Generator().manual_seed(params.seed & 0x7FFF_FFFF_FFFF_FFFF)

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def bans_end(self, index: int) -> bool:
        """Whether output token `index` must not be an end token."""
        return index < self.min_new_tokens and bool(self.eos_ids)

    def changes_logits(self, index: int) -> bool:
        """Whether a penalty, the bias or the ban of end tokens applies to output token `index`."""
        return self.has_penalties or bool(self.logit_bias) or self.bans_end(index)

    def truncates(self, vocab_size: int) -> bool:
        """Whether top-k, top-p or min-p leaves out any of `vocab_size` tokens."""
        return 0 < self.top_k < vocab_size or self.top_p < 1.0 or self.min_p > 0.0

    def uniform(self, index: int) -> float:
        """The number in [0, 1) that output token `index` is drawn with, the same at each call."""
        while len(self._uniforms) <= index:
            if self._generator is None:
                self._uniforms.append(_random.random())
            else:
                numbers = torch.rand(UNIFORMS, dtype=torch.float64, generator=self._generator)
                self._uniforms.extend(numbers.tolist())
        return self._uniforms[index]

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply penalties, the bias and the ban of end tokens to one row `[vocab]`, in place."""
        output_ids = list(self.output_counts)
        if self.repetition_penalty != 1.0:
            ids = torch.tensor(list({*self.prompt_ids, *output_ids}))
            scores = logits[ids]
            logits[ids] = torch.where(
                scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty
            )
        if output_ids and (self.presence_penalty or self.frequency_penalty):
            counts = torch.tensor(list(self.output_counts.values()), dtype=logits.dtype)
            penalties = self.presence_penalty + self.frequency_penalty * counts
            logits[torch.tensor(output_ids)] -= penalties
        if self.logit_bias:
            ids = torch.tensor(list(self.logit_bias))
            logits[ids] += torch.tensor(list(self.logit_bias.values()), dtype=logits.dtype)
        if self.bans_end(self.output_tokens):
            logits[torch.tensor(self.eos_ids)] = float("-inf")

    def record(self, token: int) -> None:
        """Count a sampled token."""
        self.output_tokens += 1
        self.output_counts[token] = self.output_counts.get(token, 0) + 1


@dataclass(frozen=True)
class RankedToken:
    """The log-probability of a sampled token, and the best tokens as (token, log-probability)."""

    logprob: float
    top: list[tuple[int, float]]


def sample(
    logits: torch.Tensor, states: Sequence[SamplerState]
) -> tuple[list[int], list[RankedToken | None]]:
    """As `choose`, and the tokens are recorded in the states."""
    tokens, ranked = choose(logits, states)
    for state, token in zip(states, tokens, strict=True):
        state.record(token)
    return tokens, ranked


def choose(
    logits: torch.Tensor, states: Sequence[SamplerState]
) -> tuple[list[int], list[RankedToken | None]]:
    """One token per row of float32 logits `[n, vocab]`, and log-probabilities where requested.

    The tokens are those after the ones that the states know. Log-probabilities are those of the
    model, before all that changes the logits.
    """
    model_logits = logits
    if any(state.changes_logits(state.output_tokens) for state in states):
        logits = logits.clone()
        for row, state in zip(logits, states, strict=True):
            if state.changes_logits(state.output_tokens):
                state.adjust(row)
    tokens = logits.argmax(-1)
    random_rows = [i for i, state in enumerate(states) if state.temperature > 0]
    if random_rows:
        random_states = [states[i] for i in random_rows]
        tokens[random_rows] = _draw(logits[random_rows], tokens[random_rows], random_states)
    return tokens.tolist(), _ranked(model_logits, tokens, states)


def _draw(logits: torch.Tensor, best: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """A random token per row; `best` is the most likely one of each."""
    scaled = logits / torch.tensor([[state.temperature] for state in states])
    uniform = torch.tensor([s.uniform(s.output_tokens) for s in states], dtype=torch.float64)
    tokens = best.clone()
    truncated = [i for i, state in enumerate(states) if state.truncates(logits.shape[-1])]
    full = sorted(set(range(len(states))) - set(truncated))
    if full:
        tokens[full] = draw(scaled[full], best[full], uniform[full])
    if truncated:
        tokens[truncated] = _draw_truncated(
            scaled[truncated], best[truncated], uniform[truncated], [states[i] for i in truncated]
        )
    return tokens


def _draw_truncated(
    logits: torch.Tensor, best: torch.Tensor, uniform: torch.Tensor, states: Sequence[SamplerState]
) -> torch.Tensor:
    """A random token per row among those that top-k, top-p and min-p keep."""
    vocab_size = logits.shape[-1]
    values, ids = logits.topk(min(CANDIDATES, vocab_size), sorted=True)
    # What all tokens weigh matters to top-p alone, without top-k.
    needs_all = (s.top_p < 1.0 and not 0 < s.top_k < vocab_size for s in states)
    weighed = logits if any(needs_all) else values
    limits = (
        torch.tensor([state.top_k for state in states]),
        torch.tensor([state.top_p for state in states], dtype=torch.float32),
        torch.tensor([state.min_p for state in states], dtype=torch.float32),
        weights(weighed, values[:, :1]).sum(-1),
    )
    thresholds, complete = cutoff_of_best(values, vocab_size, *limits)
    amounts = weights(values, values[:, :1]) * (values >= thresholds[:, None])
    # In the order of ids, as over the whole vocabulary.
    ids, order = ids.sort(-1)
    index = invert(amounts.gather(-1, order), uniform)
    tokens = ids.gather(-1, index[:, None])[:, 0]
    rows = (~complete).nonzero()[:, 0]
    if len(rows):
        whole = logits[rows]
        # numpy sorts numbers several times as fast as torch.
        values = -torch.from_numpy(np.sort(-whole.numpy()))
        thresholds, _ = cutoff_of_best(values, vocab_size, *(limit[rows] for limit in limits))
        tokens[rows] = draw(whole, best[rows], uniform[rows], thresholds)
    return tokens


def _ranked(
    logits: torch.Tensor, tokens: torch.Tensor, states: Sequence[SamplerState]
) -> list[RankedToken | None]:
    ranked: list[RankedToken | None] = [None] * len(states)
    counts = {i: s.logprobs for i, s in enumerate(states) if s.logprobs is not None}
    if counts:
        rows = list(counts)
        ranks = rank(logits[rows], tokens[rows], max(counts.values()))
        for i, token in zip(rows, ranked_tokens(ranks, list(counts.values())), strict=True):
            ranked[i] = token
    return ranked


def ranked_tokens(
    ranks: tuple[torch.Tensor, torch.Tensor, torch.Tensor], counts: Sequence[int]
) -> list[RankedToken]:
    """The results of `distribution.rank`, cut to each row's own count."""
    rows = zip(*(column.tolist() for column in ranks), counts, strict=True)
    return [
        RankedToken(logprob, list(zip(ids, values, strict=True))[:count])
        for logprob, ids, values, count in rows
    ]
