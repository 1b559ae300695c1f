"""Tokenisation: prompts to token ids, token ids to text, and single tokens to their bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from runners.contracts.errors import ContextLengthExceeded, InvalidRequest
from runners.contracts.text import ChatPrompt

MAX_REASON = 300
"""Characters of a template's own error message that are passed on."""
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class PromptTokenizer:
    """The model's tokenizer with the checks of a server. Safe to call from several threads.

    `max_tokens` bounds the prompt. What a request can make expensive is called in the processes of
    `tokenizer_process` only.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, max_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._max_token_length = max(map(len, tokenizer.get_vocab()), default=1)
        self._bytes = _byte_alphabet(tokenizer)
        # The first call drops the truncation settings of tokenizer.json. While another thread
        # encodes, that would raise "Already borrowed".
        tokenizer("a")

    def encode(self, prompt: str | list[int], *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, or the ids that were given.

        A text that cannot fit `max_tokens` is refused before it is tokenised, which takes long.
        Raises: InvalidRequest, ContextLengthExceeded.
        """
        if isinstance(prompt, str):
            if len(prompt) > self._max_tokens * self._max_token_length:
                raise ContextLengthExceeded(
                    f"has {len(prompt)} characters, more than the {self._max_tokens} tokens that "
                    "are allowed can hold",
                    field="prompt",
                )
            ids = list(
                self.tokenizer(
                    prompt, add_special_tokens=add_special_tokens, verbose=False
                ).input_ids
            )
        else:
            ids = list(prompt)
        # Ids of texts are checked too: a tokenizer may have tokens without an embedding.
        self._check_ids(ids, field="prompt")
        return ids

    def render(self, prompt: ChatPrompt) -> str:
        """The text of a conversation, with the special tokens that the template writes.

        Raises: InvalidRequest, MemoryError.
        """
        if not self.tokenizer.chat_template:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions or /generate",
                field="messages",
            )
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt.add_generation_prompt, tokenize=False
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {str(error)[:MAX_REASON]}",
                field="messages",
            ) from None
        except MemoryError:
            raise
        except Exception as error:  # a template is a program that comes with the model
            raise InvalidRequest(
                f"the model's chat template fails on these messages: {type(error).__name__}",
                field="messages",
            ) from None
        return cast(str, text)

    def _check_ids(self, token_ids: Sequence[int], *, field: str) -> None:
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token} is outside the vocabulary (0 to {self.vocab_size - 1})",
                    field=field,
                )

    def ensure_not_empty(self, ids: list[int]) -> list[int]:
        """The ids, or the begin-of-sequence token if there are none.

        Raises: InvalidRequest if the tokenizer has no such token.
        """
        if ids:
            return ids
        if self.tokenizer.bos_token_id is None:
            raise InvalidRequest("has no tokens", field="prompt")
        return [cast(int, self.tokenizer.bos_token_id)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids. Raises: InvalidRequest for an id outside the vocabulary."""
        self._check_ids(token_ids, field="tokens")
        return str(
            self.tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def special_ids(self, texts: Sequence[str]) -> frozenset[int]:
        """The ids of the texts that are special tokens, which decoding omits."""
        ids = (self.tokenizer.convert_tokens_to_ids(text) for text in texts)
        return frozenset(i for i in ids if isinstance(i, int) and i in self._special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text, maybe a part of a UTF-8 character."""
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        if name is None:  # a row of the embedding beyond the tokenizer's vocabulary
            return b""
        token = str(name)
        if (match := _BYTE_FALLBACK.fullmatch(token)) is not None:
            return bytes([int(match[1], 16)])
        if token_id in self._special_ids:
            return token.encode()
        if self._bytes and all(character in self._bytes for character in token):
            return bytes(self._bytes[character] for character in token)
        return token.replace("▁", " ").encode()


def _byte_alphabet(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Character to byte for byte-level BPE (GPT-2's table); empty for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return {}
    state = json.loads(backend.decoder.__getstate__())
    if "ByteLevel" not in json.dumps(state):
        return {}
    table: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return {character: byte for byte, character in table.items()}
