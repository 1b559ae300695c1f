"""MII's request, with exact lengths and a text of its own.

MII's counts the prompt among `min_new_tokens`, generates a token too many up to `max_length`, and
forgets what it generated when its KV is taken away. What ends it, and the text so far, is kept
here; the fields MII's scheduler reads keep their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mii.batching.data_classes import Request
from mii.constants import GenerationFinishReason

from runners.text.detokenizer import Detokenizer
from runners.text.sampling import SamplerState

NONE: Any = GenerationFinishReason.NONE
STOP: Any = GenerationFinishReason.STOP
LENGTH: Any = GenerationFinishReason.LENGTH


@dataclass
class Progress:
    """What a request has come to, whichever copy of it MII works on."""

    prompt: list[int]
    sampler: SamplerState
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    """Generated so far, an end token among them."""
    text: str = ""
    """Certain text that has not been handed out."""
    unsent: list[int] = field(default_factory=list)
    """Tokens that have not been handed out."""
    ended: Any = NONE

    def take(self, token: int, *, most: int) -> None:
        """A token was sampled; `most` may be generated in all."""
        self.tokens.append(token)
        self.unsent.append(token)
        if token in self.eos_ids:
            self.ended = STOP
        else:
            may_stop = len(self.tokens) >= self.sampler.min_new_tokens
            self.text += self.detokenizer.add(token, may_stop=may_stop)
            if self.detokenizer.stopped:
                self.ended = STOP
            elif len(self.tokens) >= most:
                self.ended = LENGTH
        if self.ended != NONE:
            self.finish()

    def finish(self) -> None:
        """Nothing will follow."""
        self.text += self.detokenizer.finish()
        self.ended = STOP if self.detokenizer.stopped else self.ended


@dataclass
class ExactRequest(Request):  # type: ignore[misc]  # MII carries no types
    """MII's request, whose end is its `progress`'s."""

    progress: Progress | None = None
    """None for a request that only gives its KV back."""

    @property
    def most(self) -> int:
        """How many tokens may be generated in all."""
        params, progress = self.generate_params, self._known
        return int(min(params.max_new_tokens, params.max_length - len(progress.prompt)))

    @property
    def _known(self) -> Progress:
        assert self.progress is not None  # noqa: S101 - only asked of requests that run
        return self.progress

    @property
    def stop_generation(self) -> bool:
        """Whether it is over."""
        return bool(self._known.ended != NONE)

    @property
    def finish_reason(self) -> Any:
        """Why it is over, or NONE."""
        return self._known.ended

    def accumulate_generated_token(self) -> None:
        """Take the token that was sampled last."""
        self._known.take(int(self.next_token), most=self.most)
