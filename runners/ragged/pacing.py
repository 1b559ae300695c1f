"""How much of a prompt a step may read beside running streams.

Every prompt token makes the step longer, and every running stream waits for it. So the share of
prompts is bounded in time, not in tokens: a step should take at most `SLOWDOWN` times what its
decoding rows alone take. Both costs are learned from the steps themselves.
"""

from __future__ import annotations

SLOWDOWN = 2.0
"""Longest step with prompt tokens, in steps without."""

SMALLEST_CHUNK = 16
"""Below this the weights are read for next to nothing."""

_LEARNING = 0.3
"""Weight of the newest observation."""


class Pacer:
    """Learns what steps cost; says how many prompt tokens the next may hold."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._prompt_token_s: float | None = None

    def budget(self, decoding: int, most: int) -> int:
        """Prompt tokens for a step that also has `decoding` rows; `most` bounds the whole step."""
        room = max(most - decoding, 1)
        if not decoding:
            return room
        if self._decode_s is None or self._prompt_token_s is None:
            return min(room, SMALLEST_CHUNK * 2)
        fitting = int((SLOWDOWN - 1) * self._decode_s / max(self._prompt_token_s, 1e-9))
        return min(room, max(fitting, SMALLEST_CHUNK))

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many decoding rows and prompt tokens took so long."""
        if not prompt_tokens:
            self._decode_s = _blend(self._decode_s, seconds)
        else:
            own = seconds - (self._decode_s or 0.0) if decoding else seconds
            self._prompt_token_s = _blend(
                self._prompt_token_s, max(own, 0.1 * seconds) / prompt_tokens
            )


def _blend(known: float | None, seen: float) -> float:
    return seen if known is None else known + _LEARNING * (seen - known)
