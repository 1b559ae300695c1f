"""MII's request with exact limits, whose text survives the loss of its KV.

MII's own counts the prompt towards `min_new_tokens`, generates one token too many up to
`max_length`, and forgets its generated tokens when its KV is freed. This one keeps what it has
generated, and why it ended, in a state that all copies share; the fields that MII's scheduler reads
keep their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mii.batching.data_classes import Request
from mii.constants import GenerationFinishReason
from typing_extensions import override

from runners.text.detokenizer import Detokenizer
from runners.text.sampling import SamplerState

NONE: Any = GenerationFinishReason.NONE
STOP: Any = GenerationFinishReason.STOP
LENGTH: Any = GenerationFinishReason.LENGTH


@dataclass
class RequestState:
    """What a request has generated; the same object for every copy that MII makes of it."""

    prompt: list[int]
    sampler: SamplerState
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    """All generated tokens, with the end token."""
    unsent_text: str = ""
    """Text that can no longer change and is not sent yet."""
    unsent_tokens: list[int] = field(default_factory=list)
    """Tokens that are not sent yet."""
    finish_reason: Any = NONE

    def append(self, token: int, *, max_tokens: int) -> None:
        """Add a sampled token; the request ends at `max_tokens` generated tokens."""
        self.tokens.append(token)
        self.unsent_tokens.append(token)
        if token in self.eos_ids:
            self.finish(STOP)
            return
        may_stop = len(self.tokens) >= self.sampler.min_new_tokens
        self.unsent_text += self.detokenizer.add(token, may_stop=may_stop)
        if self.detokenizer.stopped:
            self.finish(STOP)
        elif len(self.tokens) >= max_tokens:
            self.finish(LENGTH)

    def finish(self, reason: Any) -> None:
        """End the request, by `reason` unless the last of its text completes a stop string."""
        self.unsent_text += self.detokenizer.finish()
        self.finish_reason = STOP if self.detokenizer.stopped else reason


@dataclass
class TrackedRequest(Request):  # type: ignore[misc]  # MII has no types
    """MII's request over a `RequestState`."""

    state: RequestState | None = None
    """None for a request that only frees the KV of its sequence."""

    @property
    def generation(self) -> RequestState:
        """The state of a request that generates."""
        assert self.state is not None  # noqa: S101 - MII asks only requests that generate
        return self.state

    @property
    def max_tokens(self) -> int:
        """How many tokens it generates at most."""
        params = self.generate_params
        return int(min(params.max_new_tokens, params.max_length - len(self.generation.prompt)))

    @property
    @override
    def stop_generation(self) -> bool:
        return bool(self.generation.finish_reason != NONE)

    @property
    @override
    def finish_reason(self) -> Any:
        return self.generation.finish_reason

    @override
    def accumulate_generated_token(self) -> None:
        self.generation.append(int(self.next_token), max_tokens=self.max_tokens)
