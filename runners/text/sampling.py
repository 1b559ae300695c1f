"""Sampling: from logits to tokens, vectorised over the batch, each sequence with its parameters.

Order and meaning follow transformers' `generate`: penalties and the ban of end tokens on the
logits, then temperature, top-k, top-p. Each token takes one uniform number. A sequence with a seed
draws it from a generator that no other sequence uses, so a seed gives the same tokens in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runners.contracts.text import SamplingParams
from runners.hf.models import SamplingDefaults

CANDIDATES = 512
"""Best tokens that top-k and top-p are applied to first. Sorting a whole vocabulary takes longer
than a step of a small model, so only rows that need more candidates are sorted whole."""


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
        self.repetition_penalty = resolve(params.repetition_penalty, defaults.repetition_penalty)
        self.presence_penalty = params.presence_penalty
        self.frequency_penalty = params.frequency_penalty
        self.min_new_tokens = int(resolve(params.min_new_tokens, defaults.min_new_tokens))
        self.logprobs = params.logprobs
        self.eos_ids = sorted(eos_ids)
        self.output_tokens = 0
        self._prompt_ids = list(set(prompt_ids))
        self._output_counts: dict[int, int] = {}
        self.generator: torch.Generator | None = None
        if params.seed is not None:
            # torch takes 64 bits; larger and negative seeds are folded into them.
            self.generator = torch.Generator().manual_seed(params.seed & 0x7FFF_FFFF_FFFF_FFFF)

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty or the ban of end tokens applies to the next token."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.output_tokens < self.min_new_tokens
        )

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply penalties and the ban of end tokens to one row `[vocab]`, in place."""
        output_ids = list(self._output_counts)
        if self.repetition_penalty != 1.0:
            ids = torch.tensor(list({*self._prompt_ids, *output_ids}))
            scores = logits[ids]
            logits[ids] = torch.where(
                scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty
            )
        if output_ids and (self.presence_penalty or self.frequency_penalty):
            counts = torch.tensor(list(self._output_counts.values()), dtype=logits.dtype)
            penalties = self.presence_penalty + self.frequency_penalty * counts
            logits[torch.tensor(output_ids)] -= penalties
        if self.output_tokens < self.min_new_tokens and self.eos_ids:
            logits[torch.tensor(self.eos_ids)] = float("-inf")

    def record(self, token: int) -> None:
        """Count a sampled token."""
        self.output_tokens += 1
        self._output_counts[token] = self._output_counts.get(token, 0) + 1


@dataclass(frozen=True)
class RankedToken:
    """The log-probability of a sampled token, and the best tokens as (token, log-probability)."""

    logprob: float
    top: list[tuple[int, float]]


def sample(
    logits: torch.Tensor, states: Sequence[SamplerState]
) -> tuple[list[int], list[RankedToken | None]]:
    """One token per row of float32 logits `[n, vocab]`, and log-probabilities where requested.

    Log-probabilities are those of the model, before penalties and temperature.
    """
    model_logits = logits
    if any(state.changes_logits for state in states):
        logits = logits.clone()
        for row, state in zip(logits, states, strict=True):
            if state.changes_logits:
                state.adjust(row)
    tokens = logits.argmax(-1)
    random_rows = [i for i, state in enumerate(states) if state.temperature > 0]
    if random_rows:
        tokens[random_rows] = _draw(logits[random_rows], [states[i] for i in random_rows])
    token_ids: list[int] = tokens.tolist()
    for state, token in zip(states, token_ids, strict=True):
        state.record(token)
    return token_ids, _logprobs(model_logits, token_ids, states)


def _draw(logits: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """A random token per row: where the cumulative distribution reaches one uniform number."""
    scaled = logits / torch.tensor([[state.temperature] for state in states])
    uniform = torch.rand(len(states), 1, dtype=torch.float64)
    for i, state in enumerate(states):
        if state.generator is not None:
            uniform[i] = torch.rand(1, dtype=torch.float64, generator=state.generator)
    tokens = torch.empty(len(states), dtype=torch.int64)
    vocab = logits.shape[-1]
    truncated = [i for i, s in enumerate(states) if 0 < s.top_k < vocab or s.top_p < 1.0]
    full = sorted(set(range(len(states))) - set(truncated))
    if full:
        tokens[full] = _invert(scaled[full].softmax(-1), uniform[full])
    for candidates in (min(CANDIDATES, vocab), vocab):
        if not truncated:
            break
        rows = truncated
        drawn = _draw_truncated(scaled[rows], [states[i] for i in rows], uniform[rows], candidates)
        tokens[rows] = drawn
        truncated = [i for i, token in zip(rows, drawn.tolist(), strict=True) if token < 0]
    return tokens


def _draw_truncated(
    logits: torch.Tensor, states: Sequence[SamplerState], uniform: torch.Tensor, candidates: int
) -> torch.Tensor:
    """A random token per row among its top-k tokens, and of these the fewest that reach top-p.

    -1 for a row that would need more than its `candidates` best tokens.
    """
    vocab = logits.shape[-1]
    best, ids = logits.topk(candidates, sorted=True)
    top_k = torch.tensor([[min(state.top_k or vocab, vocab)] for state in states])
    top_p = torch.tensor([[state.top_p] for state in states])
    masked = best.masked_fill(torch.arange(candidates)[None] >= top_k, float("-inf"))
    # top-p applies to the distribution that top-k leaves.
    total = torch.where(
        top_k < vocab, masked.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True)
    )
    probabilities = (masked - total).exp()
    cumulative = probabilities.cumsum(-1)
    inside = cumulative - probabilities < top_p
    inside[:, 0] = True
    complete = (top_k <= candidates) | ((top_k >= vocab) & (cumulative[:, -1:] >= top_p))
    tokens = ids.gather(-1, _invert(probabilities * inside, uniform)[:, None])
    return tokens.masked_fill(~complete & (candidates < vocab), -1)[:, 0]


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Per row, the first index whose cumulative weight exceeds the uniform number's share."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return index.clamp_max(weights.shape[-1] - 1)


def _logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], states: Sequence[SamplerState]
) -> list[RankedToken | None]:
    ranked: list[RankedToken | None] = [None] * len(states)
    for i, state in enumerate(states):
        if state.logprobs is not None:
            row = logits[i].log_softmax(-1)
            values, ids = row.topk(min(state.logprobs, len(row)))
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            ranked[i] = RankedToken(float(row[token_ids[i]]), top)
    return ranked
