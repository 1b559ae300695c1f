"""Requests and responses of the native text routes."""

from __future__ import annotations

from typing import Annotated, Any, Self

import bentoml
import msgspec
from pydantic import BaseModel, Field, SkipValidation
from starlette.requests import Request
from typing_extensions import TypedDict, override

from api.http.json_pieces import json_of
from api.http.schemas import (
    LogprobCount,
    Message,
    Messages,
    MinTokenCount,
    ModelName,
    SamplingFields,
    TokenCount,
    TokenIds,
    WireModel,
)
from api.models.text import MAX_SEQUENCES
from runners.contracts.errors import InvalidRequest
from runners.contracts.text import FinishReason, SamplingParams

Text = Annotated[str, Field(max_length=16_000_000)]


class NativeBody(WireModel, bentoml.IODescriptor):  # type: ignore[misc]  # bentoml's is Any
    """A request body that BentoML parses."""

    model: ModelName | None = None
    """The model's name, as `/v1/models` lists it. Default: the model that is served."""

    @classmethod
    @override
    async def from_http_request(cls, request: Request, serde: Any) -> Self | InvalidRequest:
        # The error is returned, and BentoML calls the handler with it: an error raised here is
        # answered in BentoML's own format and logged together with the body.
        try:
            return cls.parse(await request.body())
        except InvalidRequest as error:
            return error


class NativeSampling(NativeBody, SamplingFields):
    """What `/generate` and `/generate_stream` have in common."""

    max_new_tokens: TokenCount | None = None
    """Maximum number of generated tokens. Default: that of the model's configuration."""
    min_new_tokens: MinTokenCount | None = None
    """The end token is not sampled before this many tokens. Default: 0."""
    logprobs: LogprobCount | None = None
    """Return each token's log-probability, and those of this many of the most likely tokens."""

    def for_runner(self) -> SamplingParams:
        """The sampling parameters. Raises: InvalidRequest."""
        return self.sampling(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            logprobs=self.logprobs,
        )


class GenerateRequest(NativeSampling):
    """Continue one prompt or several."""

    prompt: Text | None = None
    """The text to continue; give this or `prompts`."""
    prompts: Annotated[list[Text], Field(min_length=1, max_length=MAX_SEQUENCES)] | None = None
    """Texts to continue independently of each other."""

    def texts(self) -> list[str]:
        """All prompts. Raises: InvalidRequest unless exactly one of the two fields is set."""
        if (self.prompt is None) == (self.prompts is None):
            raise InvalidRequest("give either prompt or prompts", field="prompt")
        return self.prompts or [self.prompt or ""]


class StreamRequest(NativeSampling):
    """Continue one prompt and send the text as it grows."""

    prompt: Text
    """The text to continue."""


class TokenizeRequest(NativeBody):
    """Tokenise a text or a conversation."""

    prompt: Text | None = None
    """A text; give this or `messages`."""
    messages: Messages[Message] | None = None
    """A conversation, rendered with the model's chat template."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its begin and end tokens to a text."""


class DetokenizeRequest(NativeBody):
    """Turn token ids into text."""

    tokens: TokenIds
    """Token ids of the model's vocabulary."""
    skip_special_tokens: bool = False
    """Whether tokens such as the end token are left out."""


class NativeResponse(bentoml.IODescriptor):  # type: ignore[misc]  # as above
    """Base of the responses; without it the docs show BentoML's name for each."""


class Alternative(TypedDict):
    """A token with its natural-log probability."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class Logprob(Alternative):
    """A token of the text."""

    # Not a list of Logprob: BentoML's schema.json cannot describe a recursive type.
    top: list[Alternative]
    """The most likely tokens at this position, best first."""


Logprobs = SkipValidation[list[Annotated[msgspec.Raw, json_of(Logprob)]]]


class GeneratedText(BaseModel):
    """One continuation."""

    index: int
    """Index of its prompt in the request."""
    generated_text: str
    prompt_length: int
    """In tokens."""
    generated_length: int
    """In tokens."""
    finish_reason: FinishReason
    """`stop`: an end token or stop string; `length`: the token limit."""
    logprobs: Logprobs | None = None
    """Per token, if requested."""


class GenerateResponse(NativeResponse):
    """All continuations, in the order of the prompts."""

    request_id: str
    model: str
    outputs: list[GeneratedText]


class StreamFrame(BaseModel):
    """A piece of the text, as one server-sent event."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    """On the last piece only."""


class StreamTotals(BaseModel):
    """The last event of a stream."""

    request_id: str
    model: str
    prompt_length: int
    generated_length: int
    finish_reason: FinishReason


class TokenizeResponse(NativeResponse):
    """Token ids."""

    tokens: SkipValidation[list[int]]
    count: int
    max_model_len: int
    """Maximum tokens of prompt and output together; 0 before the model was ready once."""


class DetokenizeResponse(NativeResponse):
    """A text."""

    text: str
