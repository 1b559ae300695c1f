"""Bodies and answers of the native text routes."""

from __future__ import annotations

from typing import Annotated, Any, Self

import bentoml
from pydantic import BaseModel, Field, PrivateAttr

from api.http.schemas import (
    LogprobCount,
    Message,
    Messages,
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
    """A request body that BentoML parses.

    BentoML would answer a validation error in a shape of its own and log it with the input. So a
    body that is not valid comes out as an empty one that knows why, and `require_valid` raises it.
    """

    _fault: InvalidRequest | None = PrivateAttr(default=None)

    model: Annotated[str, Field(max_length=256)] | None = None
    """The model's name, as `/v1/models` lists it. Default: the one this server holds."""

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **_: Any) -> Self:
        """Parse a body, good or bad."""
        try:
            return cls.parse(json_data)
        except InvalidRequest as fault:
            broken = cls.model_construct()
            broken._fault = fault
            return broken

    def require_valid(self) -> None:
        """Raises: InvalidRequest if the body was not valid."""
        if self._fault is not None:
            raise self._fault


class NativeSampling(NativeBody, SamplingFields):
    """What `/generate` and `/generate_stream` share."""

    max_new_tokens: TokenCount | None = None
    """Upper bound on generated tokens. Default: the server's."""
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    """The end token is not taken before this many tokens. Default: 0."""
    logprobs: LogprobCount | None = None
    """Report each token's log-probability, and this many of the likeliest beside it."""

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
        """All prompts. Raises: InvalidRequest unless exactly one of the two fields is given."""
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
    """Let the tokenizer add its begin and end tokens to a text."""


class DetokenizeRequest(NativeBody):
    """Turn token ids into text."""

    tokens: TokenIds
    """Token ids of the model's vocabulary."""
    skip_special_tokens: bool = False
    """Leave out tokens such as the end token."""


class NativeAnswer(bentoml.IODescriptor):  # type: ignore[misc]  # as above
    """Base of the answers, which gives them their own names in the docs."""


class Alternative(BaseModel):
    """A token with its natural-log probability."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class Logprob(Alternative):
    """A token of the text."""

    # Not a list of itself: BentoML's schema.json can not hold a recursive type.
    top: list[Alternative]
    """The likeliest tokens at this place, best first."""


class GeneratedText(BaseModel):
    """One continuation."""

    index: int
    """The place of its prompt in the request."""
    generated_text: str
    prompt_length: int
    """In tokens."""
    generated_length: int
    """In tokens."""
    finish_reason: FinishReason
    """`stop`: an end token or stop string; `length`: the token limit."""
    logprobs: list[Logprob] | None = None
    """Per token, if asked for."""


class GenerateResponse(NativeAnswer):
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
    logprobs: list[Logprob] | None = None
    finish_reason: FinishReason | None = None
    """On the last piece only."""


class StreamTotals(BaseModel):
    """The last event of a stream."""

    request_id: str
    model: str
    prompt_length: int
    generated_length: int
    finish_reason: FinishReason


class TokenizeResponse(NativeAnswer):
    """Token ids."""

    tokens: list[int]
    count: int
    max_model_len: int
    """How many tokens prompt and output may have together; 0 until the model was ready once."""


class DetokenizeResponse(NativeAnswer):
    """A text."""

    text: str
