"""What request bodies have in common: strictness, bounds, and the fields of text and images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import SystemRandom
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, from_json

from api.http.context import current_request
from api.http.errors import invalid_request
from runners.contracts.errors import InvalidRequest
from runners.contracts.images import ImageRequest
from runners.contracts.text import ChatMessage, ChatPrompt, SamplingParams

MAX_NEW_TOKENS = 1_000_000
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_BIASES = 300
ID_PATTERN = "^(0|[1-9][0-9]{0,9})$"
"""A token id as a field of JSON."""
MAX_MESSAGES = 4096
MAX_IMAGES = 10
"""Images per request."""
MAX_SIDE = 16_383
"""In pixels: the limit of WebP."""
MAX_STEPS = 1000
MAX_NODES = 50_000
"""Lists, objects and fields in a body: making Python objects of many takes long."""
SEEDS = 2**63
"""Seeds are below this number."""

_random = SystemRandom()


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
            raise invalid_request(error) from None


def read_json(body: str | bytes | bytearray) -> Any:
    """The values in a JSON body. Raises: InvalidRequest.

    Unlike `json.loads`, pydantic's parser refuses lone surrogates, takes integers of any length and
    does not reach the recursion limit. It makes Python objects, which are validated afterwards:
    `model_validate_json` takes twice the time and five times the memory for a body of many small
    lists, and it blocks the event loop meanwhile. Neither can be interrupted, so the number of
    lists and objects is bounded.
    """
    content = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    if _nodes(content) > MAX_NODES and _nodes(_outside_strings(content)) > MAX_NODES:
        raise InvalidRequest(f"the body has more than {MAX_NODES} lists, objects and fields")
    try:
        return from_json(body)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def _nodes(content: bytes | bytearray) -> int:
    """The lists, objects and fields of JSON without strings."""
    return sum(content.count(mark) for mark in (b"[", b"{", b":"))


def _outside_strings(content: bytes | bytearray) -> bytes:
    """JSON without the content of its strings."""
    unescaped = content.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2])


def nth_seed(seed: int, index: int) -> int:
    """The seed of sequence or image `index` of a request with a seed."""
    return (seed + index) % SEEDS


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _token_id(key: object) -> int:
    if not isinstance(key, str) or not re.fullmatch(ID_PATTERN, key):
        raise PydanticCustomError("token_id", "the key should be a token id")
    return int(key)


ModelName = Annotated[str, Field(max_length=256)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
TokenIdKey = Annotated[
    int, BeforeValidator(_token_id), WithJsonSchema({"type": "string", "pattern": ID_PATTERN})
]
LogitBias = Annotated[
    dict[TokenIdKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)
]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(max_length=1_000_000, fail_fast=True)
]
TokenCount = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
MinTokenCount = Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(WireModel):
    """How tokens are chosen and when generation ends; null means the default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy. Default: the model's own, else 0 for the native routes and 1 for `/v1`."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep the most likely tokens whose probabilities add up to this. Default: the model's own."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_NEW_TOKENS)] | None = None
    """Keep this many of the most likely tokens; 0 or -1 keeps all. Default: the model's own."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop tokens less likely than this share of the most likely one; 0 keeps all. Default: the
    model's own."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Above 1: tokens of the prompt and the output become less likely. Default: the model's own."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the score of tokens that were generated already. Default: 0."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from a token's score for each time it was generated. Default: 0."""
    logit_bias: LogitBias | None = None
    """Added to the scores of up to 300 tokens, by token id, from -100 to 100. Default: none."""
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    """The same request with the same seed gives the same text."""
    stop: StopStrings | None = None
    """Up to 16 strings of up to 256 characters; the text ends before the first that appears.
    Default: the model's own; an empty list means none."""
    ignore_eos: bool | None = None
    """Continue after the end token, up to the token limit. Default: false."""

    def sampling(
        self,
        *,
        max_new_tokens: int | None,
        min_new_tokens: int | None,
        logprobs: int | None,
        default_new_tokens: int | None = None,
        fill_context: bool = False,
        default_temperature: float | None = None,
    ) -> SamplingParams:
        """The sampling parameters of these fields and of those that the routes name differently."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        presence, frequency = (0.0 if penalty is None else penalty for penalty in penalties)
        temperature = default_temperature if self.temperature is None else self.temperature
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            default_new_tokens=default_new_tokens,
            fill_context=fill_context,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class TextPart(WireModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Role = Literal["system", "developer", "user", "assistant"]


class Message(WireModel):
    """One turn of a chat."""

    role: Role
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    """Text, or text parts, which are joined by line ends."""
    name: Annotated[str, Field(max_length=256)] | None = None
    """Accepted for compatibility and ignored: chat templates do not use it."""

    def for_template(self) -> ChatMessage:
        """The turn for a chat template, which knows `developer` by its older name `system`."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return ChatMessage(role=role, content=self.content)
        return ChatMessage(role=role, content="\n".join(part.text for part in self.content))


Turn = TypeVar("Turn", bound=Message)
Messages = Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def chat_prompt(messages: Sequence[Message]) -> ChatPrompt:
    """The prompt of a conversation."""
    return ChatPrompt(messages=[message.for_template() for message in messages])


Side = Annotated[int, Field(ge=8, le=MAX_SIDE)]
ImagePrompt = Annotated[str, Field(min_length=1, max_length=32_000)]
ImageCount = Annotated[int, Field(ge=1, le=MAX_IMAGES)]


class ImageFields(WireModel):
    """How an image is generated; null means the model's own default."""

    prompt: ImagePrompt
    """What the image shows."""
    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    """What the image must not show."""
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """How closely the image follows the prompt; up to 1 there is no guidance."""
    scheduler: Annotated[str, Field(max_length=64)] | None = None
    """Such as `ddim`, `euler` or `dpm++_2m`; an error lists those that fit the model."""
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    """The same request with the same seed gives the same image, up to rounding; image i has
    `seed + i`."""

    def to_requests(
        self, n: int, *, height: int | None, width: int | None, previews: int = 0
    ) -> list[ImageRequest]:
        """The requests for `n` images, with consecutive seeds; the first is random if none is set.

        `height` and `width` are in pixels.
        """
        seed = _random.getrandbits(31) if self.seed is None else self.seed
        return [
            ImageRequest(
                request_id=current_request().new_part_id(),
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                height=height,
                width=width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                scheduler=self.scheduler,
                seed=nth_seed(seed, i),
                previews=previews,
            )
            for i in range(n)
        ]
