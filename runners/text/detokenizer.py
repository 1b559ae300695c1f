"""Tokens to text as they come: no broken characters, no text behind a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
_MAX_PENDING = 16
"""Tokens that may wait for the rest of a character, which has four bytes at most; what is still
broken then stays broken, and waiting on would make each token dearer than the last."""


class Detokenizer:
    """Turns one sequence's tokens into text deltas.

    A token is decoded together with its neighbours before it (a token's text may depend on them)
    and its text held back while it ends inside a character, or while it may be the beginning of a
    stop string. The concatenated deltas equal the whole decoded text, cut before the stop string;
    bytes that are no UTF-8 at all show as U+FFFD.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        context: Sequence[int] = (),
    ) -> None:
        self._decoder = _decoder(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._stop = [s for s in stop if s]
        # Tokens from _start to _known are context: their text is out, or in the prompt.
        self._ids = list(context)
        self._start = 0
        self._known = len(self._ids)
        self._before = self._decode(0, self._known)
        self._text = ""
        self._sent = 0
        self.stopped = False

    def add(self, token: int, *, may_stop: bool = True) -> str:
        """Take a token; return the text that is now certain. Sets `stopped` at a stop string."""
        self._ids.append(token)
        after = self._decode(self._start, len(self._ids))
        pending = len(self._ids) - self._known
        if not after.endswith(_INCOMPLETE) or pending > _MAX_PENDING:
            self._commit(after)
        if may_stop and self._cut_at_stop():
            return self._release(len(self._text))
        return self._release(len(self._text) - self._possible_stop())

    def finish(self) -> str:
        """No token will follow: return what was held back. May set `stopped`."""
        if not self.stopped:
            self._commit(self._decode(self._start, len(self._ids)))
            self._cut_at_stop()
        return self._release(len(self._text))

    def _commit(self, after: str) -> None:
        grown = after[len(self._before) :]
        self._text += grown
        if self._special.issuperset(self._ids[self._known :]):
            # They have no text: kept, they would become all the context there is.
            del self._ids[self._known :]
        elif grown or len(self._ids) - self._start > _MAX_PENDING:
            self._start, self._known = self._known, len(self._ids)
            self._before = self._decode(self._start, self._known)
        else:  # the text of a lone SentencePiece space shows with the next token only
            self._known, self._before = len(self._ids), after

    def _decode(self, start: int, end: int) -> str:
        return self._decoder(self._ids[start:end])

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


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Ids to text without special tokens: straight to the tokenizer's Rust part where there is one,
    which takes a tenth of the time its wrapper does."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: str(backend.decode(ids, skip_special_tokens=True))
    return lambda ids: str(
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
