"""How much of the prompts a step may read beside running streams.

Every prompt token makes the step longer, and every running stream waits for it. So the share of
prompts is bounded in time, not in tokens: each prompt that is being read may lengthen a step by
`SHARE` times what the step's decoding rows alone take. One long prompt can not stall the streams,
and many short ones do not wait for one another. What steps cost is learned from the steps.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SHARE = 0.8
"""What one prompt may add to a step, in steps without prompts."""

SMALLEST_CHUNK = 16
"""Below this the weights are read for next to nothing."""


class Pacer:
    """Learns what steps cost; says how many prompt tokens the next may hold.

    Medians, because a step may take ten times as long for reasons of the machine's own.
    """

    def __init__(self) -> None:
        self._decode_s: deque[float] = deque(maxlen=15)
        self._prompt_token_s: deque[float] = deque(maxlen=5)

    def budget(self, decoding: int, prompts: int, most: int) -> int:
        """Prompt tokens, of `prompts` sequences, for a step that also has `decoding` rows; `most`
        bounds the whole step."""
        room = max(most - decoding, 1)
        if not decoding:
            return room
        if not self._decode_s or not self._prompt_token_s:
            return min(room, 2 * SMALLEST_CHUNK * max(prompts, 1))
        time_s = SHARE * prompts * median(self._decode_s)
        fitting = int(time_s / max(median(self._prompt_token_s), 1e-9))
        return min(room, max(fitting, SMALLEST_CHUNK))

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many decoding rows and prompt tokens took so long."""
        if not prompt_tokens:
            self._decode_s.append(seconds)
        elif not decoding:
            self._prompt_token_s.append(seconds / prompt_tokens)
        elif self._decode_s and prompt_tokens >= SMALLEST_CHUNK // 2:
            own = seconds - median(self._decode_s)
            self._prompt_token_s.append(max(own, 0.1 * seconds) / prompt_tokens)
