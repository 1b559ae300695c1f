"""Requests, results and the interface of text-generation models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from runners.contracts.runner import Runner

FinishReason = Literal["stop", "length"]
"""`stop`: an end token or a stop string; `length`: the token limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a chat, as the model's chat template takes it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation that the rank renders with the model's own chat template."""

    messages: list[ChatMessage]
    add_generation_prompt: bool = True


Prompt = str | list[int] | ChatPrompt
"""Text, token ids, or a conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    `None` means the model's own default (its `generation_config.json`), else the neutral value.
    """

    max_new_tokens: int | None = None
    """Upper bound on generated tokens; None: `default_new_tokens`."""
    default_new_tokens: int | None = None
    """What no upper bound means, cut to what fits the context; None: the model's default."""
    fill_context: bool = False
    """Whether no upper bound means all that fits the context, if the model has no default."""
    min_new_tokens: int | None = None
    """End tokens are not sampled before this many tokens were generated."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    """0 keeps the whole vocabulary."""
    min_p: float | None = None
    """Drops tokens less probable than this share of the most probable one; 0 keeps all."""
    repetition_penalty: float | None = None
    """As in CTRL (arXiv:1909.05858): over prompt and output; 1 is neutral."""
    presence_penalty: float = 0.0
    """As in the OpenAI API: subtracted once from tokens already generated."""
    frequency_penalty: float = 0.0
    """As in the OpenAI API: subtracted per time a token was already generated."""
    logit_bias: dict[int, float] | None = None
    """As in the OpenAI API: added to the logits of these token ids."""
    seed: int | None = None
    """Same seed, same prompt, same text, whatever else is in the batch."""
    stop: list[str] | None = None
    """Generation ends before the first of these strings; it is not part of the text."""
    ignore_eos: bool | None = None
    """Whether generation continues after an end token."""
    logprobs: int | None = None
    """How many alternatives to report per token (0: the chosen token only); None: no logprobs."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One sequence to generate."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams = msgspec.field(default_factory=SamplingParams)


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A token with its natural-log probability under the unmodified model distribution.

    A request may ask for a million of them: they are invisible to the garbage collector, whose
    passes would take longer with each, and arrays in a message.
    """

    token_id: int
    token: str
    """The token decoded alone; a piece of a multi-byte character shows U+FFFD."""
    token_bytes: bytes
    """The bytes the token stands for."""
    logprob: float
    text_offset: int = 0
    """Where its text begins in the whole text, in characters. For a piece of a character: where
    that character begins."""
    top: tuple[TokenLogprob, ...] = ()
    """The most likely tokens, best first, each with an empty `top`."""


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one or more steps added to a sequence.

    The concatenation of all `text` is the whole text; a delta never ends inside a UTF-8 character.
    `text` may be empty while the detokeniser waits for the rest of a character or stop string.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    """Set on the last delta only."""

    @property
    def finished(self) -> bool:
        """Whether it is the last delta of its request."""
        return self.finish_reason is not None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the loaded model is, as the rank reports it when ready."""

    architecture: str
    engine: str
    parameters: int
    dtype: str
    devices: list[str]
    max_context: int
    """Longest prompt plus output, in tokens."""
    vocab_size: int
    max_kv_tokens: int
    has_chat_template: bool
    default_temperature: float | None = None
    """The temperature of requests that name none, as the model's files or its operator set it, 0
    for greedy; None where neither does."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output that can be served: the context, within the KV bound."""
        # The last token is sampled but never fed back, so it needs no KV.
        return min(self.max_context, self.max_kv_tokens + 1)


class TextRunner(Runner[GenerationRequest, TextDelta], Protocol):
    """A text model, on any of the engines."""

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None before they were ready once."""
        ...

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text or a rendered conversation. Raises: InvalidRequest."""
        ...

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Raises: InvalidRequest for ids outside the vocabulary."""
        ...
