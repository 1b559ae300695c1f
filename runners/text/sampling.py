"""From logits to tokens: vectorised over the batch, each sequence with its own parameters.

Order and meaning follow transformers' `generate`: penalties and the end-token ban on the logits,
then temperature, top-k, top-p. A token takes one uniform number, from a generator of its own where
the sequence has a seed, so that a seed gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runners.contracts.text import SamplingParams
from runners.hf.models import SamplingDefaults

CANDIDATES = 512
"""Best tokens that top-k and top-p look at first; sorting a whole vocabulary takes longer than a
small model's step, and is left to those whose cut lies further down."""


class SamplerState:
    """One sequence's parameters, resolved, and what sampling remembers of it."""

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
        # Dividing by less overflows float32; the distribution is all on the best token by then.
        self.temperature = temperature if temperature >= 1e-5 else 0.0
        self.top_p = resolve(params.top_p, defaults.top_p)
        self.top_k = int(resolve(params.top_k, defaults.top_k))
        self.repetition = resolve(params.repetition_penalty, defaults.repetition_penalty)
        self.presence = params.presence_penalty
        self.frequency = params.frequency_penalty
        self.min_new_tokens = int(resolve(params.min_new_tokens, defaults.min_new_tokens))
        self.logprobs = params.logprobs
        self.eos_ids = sorted(eos_ids)
        self.generated = 0
        self._prompt_ids = list(set(prompt_ids))
        self._counts: dict[int, int] = {}
        self.generator: torch.Generator | None = None
        if params.seed is not None:
            # torch takes 64 bits; any integer a client sends folds into them.
            self.generator = torch.Generator().manual_seed(params.seed & 0x7FFF_FFFF_FFFF_FFFF)

    @property
    def touches_logits(self) -> bool:
        """Whether anything but temperature, top-k and top-p applies."""
        return (
            self.repetition != 1.0
            or self.presence != 0.0
            or self.frequency != 0.0
            or self.generated < self.min_new_tokens
        )

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply penalties and the end-token ban to one row `[vocab]`, in place."""
        counted = list(self._counts)
        if self.repetition != 1.0:
            seen = torch.tensor(list({*self._prompt_ids, *counted}))
            scores = logits[seen]
            logits[seen] = torch.where(
                scores < 0, scores * self.repetition, scores / self.repetition
            )
        if counted and (self.presence or self.frequency):
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits[torch.tensor(counted)] -= self.presence + self.frequency * counts
        if self.generated < self.min_new_tokens and self.eos_ids:
            logits[torch.tensor(self.eos_ids)] = float("-inf")

    def took(self, token: int) -> None:
        """Remember a sampled token."""
        self.generated += 1
        self._counts[token] = self._counts.get(token, 0) + 1


@dataclass(frozen=True)
class RankedToken:
    """A sampled token's log-probability and the best alternatives as (token, logprob)."""

    logprob: float
    top: list[tuple[int, float]]


def sample(
    logits: torch.Tensor, states: Sequence[SamplerState]
) -> tuple[list[int], list[RankedToken | None]]:
    """One token for each row of float32 logits `[n, vocab]`, and logprobs where asked for.

    Logprobs are of the model's own distribution, before penalties and temperature.
    """
    raw = logits
    if any(state.touches_logits for state in states):
        logits = logits.clone()
        for row, state in zip(logits, states, strict=True):
            if state.touches_logits:
                state.adjust(row)
    tokens = logits.argmax(-1)
    drawn = [i for i, state in enumerate(states) if state.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [states[i] for i in drawn])
    picked: list[int] = tokens.tolist()
    for state, token in zip(states, picked, strict=True):
        state.took(token)
    return picked, _logprobs(raw, picked, states)


def _draw(logits: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """A token for each row, by inverting the distribution at one uniform number per row."""
    scaled = logits / torch.tensor([[state.temperature] for state in states])
    uniform = torch.rand(len(states), 1, dtype=torch.float64)
    for i, state in enumerate(states):
        if state.generator is not None:
            uniform[i] = torch.rand(1, dtype=torch.float64, generator=state.generator)
    tokens = torch.empty(len(states), dtype=torch.int64)
    vocab = logits.shape[-1]
    cut = [i for i, s in enumerate(states) if 0 < s.top_k < vocab or s.top_p < 1.0]
    whole = sorted(set(range(len(states))) - set(cut))
    if whole:
        tokens[whole] = _invert(scaled[whole].softmax(-1), uniform[whole])
    for candidates in (min(CANDIDATES, vocab), vocab):
        if not cut:
            break
        chosen = _draw_best(scaled[cut], [states[i] for i in cut], uniform[cut], candidates)
        tokens[cut] = chosen
        cut = [i for i, token in zip(cut, chosen.tolist(), strict=True) if token < 0]
    return tokens


def _draw_best(
    logits: torch.Tensor, states: Sequence[SamplerState], uniform: torch.Tensor, candidates: int
) -> torch.Tensor:
    """Draw among each row's top-k tokens, and the fewest of those that reach top-p; -1 for a row
    whose cut lies beyond its `candidates` best tokens."""
    vocab = logits.shape[-1]
    best, ids = logits.topk(candidates, sorted=True)
    top_k = torch.tensor([[min(state.top_k or vocab, vocab)] for state in states])
    top_p = torch.tensor([[state.top_p] for state in states])
    kept = best.masked_fill(torch.arange(candidates)[None] >= top_k, float("-inf"))
    # What top-k leaves is a distribution of its own, of which top-p takes its share.
    total = torch.where(
        top_k < vocab, kept.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True)
    )
    probabilities = (kept - total).exp()
    reached = probabilities.cumsum(-1)
    inside = reached - probabilities < top_p
    inside[:, 0] = True
    complete = (top_k <= candidates) | ((top_k >= vocab) & (reached[:, -1:] >= top_p))
    drawn = ids.gather(-1, _invert(probabilities * inside, uniform)[:, None])
    return drawn.masked_fill(~complete & (candidates < vocab), -1)[:, 0]


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Per row, the first index at which the running sum of weights exceeds its uniform share."""
    reached = weights.cumsum(-1, dtype=torch.float64)
    at = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)[:, 0]
    return at.clamp_max(weights.shape[-1] - 1)


def _logprobs(
    logits: torch.Tensor, picked: Sequence[int], states: Sequence[SamplerState]
) -> list[RankedToken | None]:
    ranked: list[RankedToken | None] = [None] * len(states)
    for i, state in enumerate(states):
        if state.logprobs is not None:
            row = logits[i].log_softmax(-1)
            values, ids = row.topk(min(state.logprobs, len(row)))
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            ranked[i] = RankedToken(float(row[picked[i]]), top)
    return ranked
