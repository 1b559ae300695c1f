"""Sampling on the device: the tokens of `runners.text.sampling.sample`, without a wait for them.

The engine calls this after each forward. Sampled tokens stay on the device as the input of the next
step, and reach the host meanwhile. Whatever decides which operations run is known on the host, and
goes to the device in one copy. Only the rows and the parts of sampling that a step needs are
computed: if all its rows are greedy, that is an argmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from typing_extensions import override

from runners.text.distribution import draw, rank
from runners.text.gpu.kernels.cutoff import cutoff
from runners.text.gpu.token_counts import TokenCounts
from runners.text.gpu.transfer import Array, HostCopy, to_device
from runners.text.samplers import SampledRow, SampledStep, Sampler, not_numbers
from runners.text.sampling import RankedToken, SamplerState, ranked_tokens


class DeviceSample(SampledStep):
    """The tokens of one step, on the device and on their way to the host."""

    def __init__(
        self, tokens: torch.Tensor, results: HostCopy, ranked: Sequence[tuple[int, int]]
    ) -> None:
        self._tokens = tokens
        self._results = results
        self._ranked = ranked

    @property
    @override
    def tokens(self) -> torch.Tensor:
        return self._tokens

    @override
    def result(self) -> list[SampledRow]:
        results = self._results.wait()
        tokens: list[int] = results["tokens"].tolist()
        ranked: list[RankedToken | None] = [None] * len(tokens)
        if self._ranked:
            rows, counts = zip(*self._ranked, strict=True)
            ranks = results["logprobs"], results["top_ids"], results["top_logprobs"]
            for row, token in zip(rows, ranked_tokens(ranks, counts), strict=True):
                ranked[row] = token
        return [
            SampledRow(None, error=not_numbers()) if token < 0 else SampledRow(token, each)
            for token, each in zip(tokens, ranked, strict=True)
        ]


class DeviceSampler(Sampler):
    """Samples on one device for logits of one vocabulary. All calls come from one thread and one
    stream of the device, or are ordered by it."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._counts = TokenCounts(vocab_size, device)

    @override
    @torch.inference_mode()
    def launch(
        self, logits: torch.Tensor, states: Sequence[SamplerState], indices: Sequence[int]
    ) -> DeviceSample:
        """Sample output token `indices[i]` of `states[i]` from row i of `logits` `[n, vocab]`.

        The logits are of any floating-point type and on the device; they are not changed. The host
        need not know the token before it, if this sampler launched that. A step may be launched
        again, with the same result. It never waits for the device. Raises: ValueError.
        """
        if logits.shape != (len(states), self._vocab_size) or len(indices) != len(states):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(states)} states and "
                f"{len(indices)} indices, with a vocabulary of {self._vocab_size}"
            )
        arrays = self._plan(states, indices)
        plan = to_device(arrays, self._device) if arrays else {}
        tokens = logits.argmax(-1)
        is_nan = logits.gather(-1, tokens[:, None])[:, 0].isnan()
        if "rows" in plan:
            sampled = self._sample(logits, tokens, plan)
            tokens = tokens.index_copy(0, plan["rows"], sampled)
        if "slots" in plan:
            self._counts.add(plan["slots"], tokens[plan["counted"]])
        results = {"tokens": tokens.masked_fill(is_nan, -1)}
        ranked = [(i, s.logprobs) for i, s in enumerate(states) if s.logprobs is not None]
        if ranked:
            most = max(count for _, count in ranked)
            rows = plan["ranked"]
            columns = rank(logits[rows].float(), tokens[rows], most)
            results |= zip(("logprobs", "top_ids", "top_logprobs"), columns, strict=True)
        return DeviceSample(tokens, HostCopy(results, self._device), ranked)

    def _plan(self, states: Sequence[SamplerState], indices: Sequence[int]) -> dict[str, Array]:
        """Which rows need what, and with which parameters; nothing for a part that none needs.

        `rows` and `ranked` are rows of the logits, all others are positions in `rows`.
        """
        adjusted = [s.changes_logits(index) for s, index in zip(states, indices, strict=True)]
        rows = [i for i, s in enumerate(states) if adjusted[i] or s.temperature > 0]
        plan: dict[str, Array] = {}
        if rows:
            chosen = [(states[i], indices[i]) for i in rows]
            plan["rows"] = _ints(rows)
            if any(adjusted):
                plan |= self._plan_penalties(chosen) | self._plan_additions(chosen)
                if "slots" in plan:
                    plan["counted"] = plan["rows"][plan["penalised"]]
            plan |= self._plan_draws(chosen)
        ranked = [i for i, state in enumerate(states) if state.logprobs is not None]
        if ranked:
            plan["ranked"] = _ints(ranked)
        return plan

    def _plan_penalties(self, chosen: Sequence[tuple[SamplerState, int]]) -> dict[str, Array]:
        penalised = [i for i, (state, _) in enumerate(chosen) if state.has_penalties]
        if not penalised:
            return {}
        states = [chosen[i][0] for i in penalised]
        return {
            "penalised": _ints(penalised),
            "slots": _ints([self._counts.slot(*chosen[i]) for i in penalised]),
            "repetition": _floats([[state.repetition_penalty] for state in states]),
            "presence": _floats([[state.presence_penalty] for state in states]),
            "frequency": _floats([[state.frequency_penalty] for state in states]),
        }

    def _plan_additions(self, chosen: Sequence[tuple[SamplerState, int]]) -> dict[str, Array]:
        """The bias and the ban of end tokens, at positions in the flattened rows."""
        size = self._vocab_size
        biases = [
            (i * size + token, bias)
            for i, (state, _) in enumerate(chosen)
            for token, bias in state.logit_bias.items()
            if 0 <= token < size
        ]
        banned = [
            i * size + token
            for i, (state, index) in enumerate(chosen)
            if state.bans_end(index)
            for token in state.eos_ids
            if 0 <= token < size
        ]
        plan: dict[str, Array] = {}
        if biases:
            plan["biased"] = _ints([position for position, _ in biases])
            plan["bias"] = _floats([bias for _, bias in biases])
        if banned:
            plan["banned"] = _ints(banned)
        return plan

    def _plan_draws(self, chosen: Sequence[tuple[SamplerState, int]]) -> dict[str, Array]:
        drawn = [i for i, (state, _) in enumerate(chosen) if state.temperature > 0]
        if not drawn:
            return {}
        states = [chosen[i][0] for i in drawn]
        plan: dict[str, Array] = {
            "drawn": _ints(drawn),
            "temperature": _floats([[state.temperature] for state in states]),
            "uniform": np.array([chosen[i][0].uniform(chosen[i][1]) for i in drawn]),
        }
        cut = [i for i, state in enumerate(states) if state.truncates(self._vocab_size)]
        if cut:
            plan["cut"] = _ints(cut)
            plan["top_k"] = np.array([states[i].top_k for i in cut], dtype=np.int32)
            plan["top_p"] = _floats([states[i].top_p for i in cut])
            plan["min_p"] = _floats([states[i].min_p for i in cut])
        return plan

    def _sample(
        self, logits: torch.Tensor, best: torch.Tensor, plan: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The tokens of the rows that are more than the argmax of their logits."""
        adjusted = bool(plan.keys() & {"penalised", "biased", "banned"})
        best = best[plan["rows"]]
        logits = _take(logits, plan["rows"]).to(torch.float32, copy=adjusted)
        if adjusted:
            self._adjust(logits, plan)
            best = logits.argmax(-1)
        if "drawn" not in plan:
            return best
        drawn = plan["drawn"]
        scaled = _take(logits, drawn) / plan["temperature"]
        thresholds = None
        if "cut" in plan:
            limits = (plan[name] for name in ("top_k", "top_p", "min_p"))
            thresholds = scaled.new_full((len(scaled),), float("-inf"))
            thresholds.index_copy_(0, plan["cut"], cutoff(_take(scaled, plan["cut"]), *limits))
        tokens = draw(scaled, best[drawn], plan["uniform"], thresholds)
        return best.index_copy(0, drawn, tokens)

    def _adjust(self, logits: torch.Tensor, plan: dict[str, torch.Tensor]) -> None:
        """Apply penalties, the bias and the ban of end tokens to float32 logits, in place."""
        if "penalised" in plan:
            counts = self._counts.output[plan["slots"]]
            is_output = counts > 0
            is_seen = is_output | self._counts.prompt[plan["slots"]]
            scores, penalty = logits[plan["penalised"]], plan["repetition"]
            repeated = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(is_seen, repeated, scores)
            penalties = plan["presence"] + plan["frequency"] * counts
            scores = torch.where(is_output, scores - penalties, scores)
            logits.index_copy_(0, plan["penalised"], scores)
        flat = logits.view(-1)
        if "biased" in plan:
            flat.scatter_add_(0, plan["biased"], plan["bias"])
        if "banned" in plan:
            flat.index_fill_(0, plan["banned"], float("-inf"))


def _take(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows in ascending order; no copy if they are all."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _ints(values: Sequence[int]) -> Array:
    return np.array(values, dtype=np.int64)


def _floats(values: Sequence[float] | Sequence[list[float]]) -> Array:
    return np.array(values, dtype=np.float32)
