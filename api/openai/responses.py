"""Responses of the OpenAI-compatible routes, field by field as in the API."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, SkipValidation
from typing_extensions import TypedDict

from api.http.json_pieces import json_of
from runners.contracts.text import FinishReason


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Logprobs of `/v1/completions`: parallel lists over the tokens."""

    tokens: SkipValidation[list[str]]
    token_logprobs: SkipValidation[list[float]]
    top_logprobs: SkipValidation[list[Annotated[msgspec.Raw, json_of(dict[str, float])]]]
    text_offset: SkipValidation[list[int]]


class CompletionChoice(BaseModel):
    """One text; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class TopLogprob(TypedDict):
    """A token with its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A generated token with the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of `/v1/chat/completions`."""

    content: SkipValidation[list[Annotated[msgspec.Raw, json_of(ChatLogprob)]]]
    refusal: None = None


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One choice of a response that is not streamed."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatDelta(TypedDict, total=False):
    """The part of the turn that a chunk adds."""

    role: Literal["assistant"]
    content: str


class ChatChunkChoice(BaseModel):
    """A piece of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ModelResponse(BaseModel):
    """What responses and chunks have in common."""

    id: str
    object: str
    created: int
    model: str


class Completion(ModelResponse):
    """Response of `/v1/completions`; in a stream, each chunk has the same fields."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatCompletion(ModelResponse):
    """Response of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(ModelResponse):
    """One chunk of a streamed response."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["triptych"] = "triptych"
    max_model_len: int | None = None
    """Maximum tokens of prompt and output together; null before the model was ready once, and for
    an image model."""


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]
