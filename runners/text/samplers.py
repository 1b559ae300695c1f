"""Samplers: who samples the tokens of a step, and when their ids are known.

`HostSampler` samples on the CPU, at once. `runners.text.gpu.sampling` has the one for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from typing_extensions import override

from runners.contracts.errors import EngineFailure
from runners.text.sampling import RankedToken, SamplerState, choose


@dataclass(frozen=True, slots=True)
class SampledRow:
    """The token of one row, or the error that kept it from being sampled."""

    token: int | None
    ranked: RankedToken | None = None
    error: Exception | None = None


class SampledStep(Protocol):
    """The tokens of a step, which may still be computed."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64 `[n]` on the device of the logits, all valid ids."""
        ...

    def result(self) -> list[SampledRow]:
        """One entry per row. Waits until they are known."""
        ...


class Sampler(Protocol):
    """Samples one token per row."""

    def launch(
        self, logits: torch.Tensor, states: Sequence[SamplerState], indices: Sequence[int]
    ) -> SampledStep:
        """Begin to sample from logits `[n, vocab]`; `indices` are the numbers of output tokens
        before the new ones."""
        ...


def not_numbers() -> EngineFailure:
    """The error of a row whose logits are NaN."""
    return EngineFailure("the model's logits are not numbers (NaN)")


class HostSampler(Sampler):
    """Samples on the CPU. A row that cannot be sampled fails alone."""

    @override
    def launch(
        self, logits: torch.Tensor, states: Sequence[SamplerState], indices: Sequence[int]
    ) -> SampledStep:
        logits = logits.float().cpu()
        rows: list[SampledRow] = [SampledRow(None, error=not_numbers())] * len(states)
        valid = [i for i, nan in enumerate(logits.sum(-1).isnan().tolist()) if not nan]
        if valid:
            kept = logits if len(valid) == len(states) else logits[valid]
            for i, row in zip(valid, _sample(kept, [states[i] for i in valid]), strict=True):
                rows[i] = row
        return HostStep(rows)


def _sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[SampledRow]:
    try:
        tokens, ranked = choose(logits, states)
    except Exception as error:
        if len(states) == 1:
            return [SampledRow(None, error=error)]
        return [_sample(logits[i : i + 1], [state])[0] for i, state in enumerate(states)]
    return [SampledRow(*each) for each in zip(tokens, ranked, strict=True)]


@dataclass(frozen=True)
class HostStep(SampledStep):
    """Tokens that are known."""

    rows: list[SampledRow]

    @property
    @override
    def tokens(self) -> torch.Tensor:
        return torch.tensor([row.token or 0 for row in self.rows], dtype=torch.int64)

    @override
    def result(self) -> list[SampledRow]:
        return self.rows


class UnsampledStep(SampledStep):
    """A step that samples nothing. Its end is waited for nevertheless: the host must not submit
    ever more steps, and the scheduler measures them."""

    def __init__(self, device: torch.device) -> None:
        self._end: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._end = torch.cuda.current_stream(device).record_event()

    @property
    @override
    def tokens(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    @override
    def result(self) -> list[SampledRow]:
        if self._end is not None:
            self._end.synchronize()
        return []
