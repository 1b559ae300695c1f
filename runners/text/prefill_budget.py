"""The number of prompt tokens in a step that running streams can bear.

Every prompt token makes the step longer for all running streams. So prefill is bounded in time, not
in tokens: each prompt may lengthen a step by `SHARE` times the duration of a step without prompts.
One long prompt cannot stall the streams, and many short ones do not wait for one another. The
durations are measured on past steps.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SHARE = 0.8
"""Time that one prompt may add to a step, relative to a step without prompts."""

MIN_CHUNK = 16
"""Tokens; a smaller chunk takes about as long, because a step reads all weights anyway."""


class PrefillBudget:
    """Measures steps, and bounds the prompt tokens of the next one.

    It uses medians, because other load on the machine can make a single step ten times as long.
    """

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque(maxlen=15)
        self._prompt_token_s: deque[float] = deque(maxlen=5)

    def tokens(self, decoding: int, prompts: int, max_step_tokens: int) -> int:
        """Prompt tokens for a step with `decoding` decoding sequences and `prompts` prompts."""
        room = max(max_step_tokens - decoding, 1)
        if not decoding:
            return room
        if not self._decode_s or not self._prompt_token_s:
            return min(room, 2 * MIN_CHUNK * max(prompts, 1))
        time_s = SHARE * prompts * median(self._decode_s)
        affordable = int(time_s / max(median(self._prompt_token_s), 1e-9))
        return min(room, max(affordable, MIN_CHUNK))

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Record the duration of a step."""
        if not prompt_tokens:
            self._decode_s.append(seconds)
        elif not decoding:
            self._prompt_token_s.append(seconds / prompt_tokens)
        elif self._decode_s and prompt_tokens >= MIN_CHUNK // 2:
            prefill_s = seconds - median(self._decode_s)
            self._prompt_token_s.append(max(prefill_s, 0.1 * seconds) / prompt_tokens)
