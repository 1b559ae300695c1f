"""Answers of the OpenAI-compatible routes, field for field as the API has them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from typing_extensions import TypedDict

from runners.contracts.text import FinishReason


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Logprobs of `/v1/completions`: parallel lists over the tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class TopLogprob(BaseModel):
    """A token with its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of the answer with the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of `/v1/chat/completions`."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One whole answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatDelta(TypedDict, total=False):
    """What a chunk adds to the turn."""

    role: Literal["assistant"]
    content: str


class ChatChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class Answer(BaseModel):
    """What answers and chunks have in common."""

    id: str
    object: str
    created: int
    model: str


class Completion(Answer):
    """Answer of `/v1/completions`; in a stream, each chunk looks the same."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatCompletion(Answer):
    """Answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Answer):
    """One chunk of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model this server holds."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["triptych"] = "triptych"
    max_model_len: int | None = None
    """How many tokens prompt and output may have together; null until it was ready once, and for
    images."""


class ModelList(BaseModel):
    """All models this server holds."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class Error(BaseModel):
    """Every error of every route."""

    error: ErrorDetail
