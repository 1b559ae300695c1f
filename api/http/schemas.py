"""What request bodies of all routes have in common: strictness, bounds, sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import from_json

from api.http.errors import refusal
from runners.contracts.errors import InvalidRequest
from runners.contracts.text import ChatMessage, ChatPrompt, SamplingParams

MAX_NEW_TOKENS = 1_000_000
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_MESSAGES = 4096


class WireModel(BaseModel):
    """Part of a request body: unknown fields, wrong types and NaN are errors."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @classmethod
    def parse(cls, body: str | bytes | bytearray) -> Self:
        """A JSON body as this model. Raises: InvalidRequest that names the field at fault."""
        return cls.checked(read_json(body or b"{}"))

    @classmethod
    def checked(cls, values: object) -> Self:
        """Values as this model. Raises: InvalidRequest that names the field at fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise refusal(error) from None


def read_json(body: str | bytes | bytearray) -> Any:
    """A JSON body. Raises: InvalidRequest.

    Other than `json.loads`, pydantic's parser refuses lone surrogates, takes integers of any length
    and does not run into the recursion limit. It makes Python objects, from which a model is made
    then: `model_validate_json` takes twice the time and five times the memory for a body of many
    small lists, and nothing else runs meanwhile.
    """
    try:
        return from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def _as_list(value: object) -> object:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None),
]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(max_length=1_000_000, fail_fast=True)
]
TokenCount = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(WireModel):
    """How tokens are chosen and when generation ends; null means the default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy. Default: the model's own, else 0 for the native routes and 1 for `/v1`."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep the likeliest tokens that reach this probability together. Default: the model's own."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_NEW_TOKENS)] | None = None
    """Keep this many of the likeliest tokens; 0 or -1 keeps all. Default: the model's own."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Above 1: tokens of the prompt and the output become less likely. Default: the model's own."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the score of tokens generated already. Default: 0."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from a token's score for each time it was generated. Default: 0."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Same seed, same request, same text."""
    stop: StopStrings = []
    """Up to 16 strings of up to 256 characters; the text ends before the first that appears."""
    ignore_eos: bool | None = None
    """Generate on after the end token, up to the token limit. Default: false."""

    def sampling(
        self,
        *,
        max_new_tokens: int | None,
        min_new_tokens: int | None,
        logprobs: int | None,
        default_new_tokens: int | None = None,
        default_temperature: float | None = None,
    ) -> SamplingParams:
        """These fields, with what the routes name differently, for the runner."""
        temperature = default_temperature if self.temperature is None else self.temperature
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            default_new_tokens=default_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=self.stop or None,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class TextPart(WireModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


Role = Literal["system", "developer", "user", "assistant"]


class Message(WireModel):
    """One turn of a chat."""

    role: Role
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    """Text, or text parts, which are joined by line ends."""
    name: Annotated[str, Field(max_length=256)] | None = None
    """Taken for compatibility; chat templates have no place for it."""

    def for_template(self) -> ChatMessage:
        """The turn as chat templates know it: `developer` is the newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return ChatMessage(role=role, content=self.content)
        return ChatMessage(role=role, content="\n".join(part.text for part in self.content))


Turn = TypeVar("Turn", bound=Message)
Messages = Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def chat_prompt(messages: Sequence[Message]) -> ChatPrompt:
    """A conversation to be answered."""
    return ChatPrompt(messages=[message.for_template() for message in messages])
