"""Tokens to text as they come: no broken characters, no text behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Turns one sequence's tokens into text deltas.

    A token is decoded together with its neighbours before it (a token's text may depend on them)
    and its text held back while it ends inside a character, or while it may be the beginning of a
    stop string. The concatenated deltas equal the whole decoded text, cut before the stop string;
    bytes that are no UTF-8 at all show as U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._ids: list[int] = []
        self._known = 0  # tokens whose text is in _text
        self._context = 0  # where decoding starts: the tokens from here to _known are context
        self._text = ""
        self._sent = 0
        self.stopped = False

    def add(self, token: int, *, may_stop: bool = True) -> str:
        """Take a token; return the text that is now certain. Sets `stopped` at a stop string."""
        self._ids.append(token)
        before = self._decode(self._context, self._known)
        after = self._decode(self._context, len(self._ids))
        if len(after) > len(before) and not after.endswith(_INCOMPLETE):
            self._text += after[len(before) :]
            self._context, self._known = self._known, len(self._ids)
        if may_stop and self._cut_at_stop():
            return self._release(len(self._text))
        return self._release(len(self._text) - self._possible_stop())

    def finish(self) -> str:
        """No token will follow: return what was held back."""
        if not self.stopped:
            before = self._decode(self._context, self._known)
            self._text += self._decode(self._context, len(self._ids))[len(before) :]
            self._known = len(self._ids)
        return self._release(len(self._text))

    def _decode(self, start: int, end: int) -> str:
        text = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # noqa: S101 - a flat list of ids decodes to one string
        return text

    def _cut_at_stop(self) -> bool:
        found = [at for s in self._stop if (at := self._text.find(s, self._sent)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
        return self.stopped

    def _possible_stop(self) -> int:
        """How many characters at the end may begin a stop string."""
        return max(
            (
                n
                for s in self._stop
                for n in range(1, min(len(s), len(self._text) - self._sent + 1))
                if self._text.endswith(s[:n])
            ),
            default=0,
        )

    def _release(self, end: int) -> str:
        delta = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return delta
