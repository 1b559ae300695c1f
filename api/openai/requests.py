"""Request bodies of the OpenAI-compatible routes.

Fields of the OpenAI API that this server does not support are known by name, so that the error
names them; their neutral values are accepted, because clients send those by default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import override

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
from runners.contracts.text import Prompt, SamplingParams

DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16


def unsupported(*neutral: object) -> BeforeValidator:
    """A field that this server does not support, except for values that have no effect."""

    def check(value: object) -> None:
        if value is not None and value not in neutral:
            raise PydanticCustomError("unsupported", "is not supported by this server")

    return BeforeValidator(check, json_schema_input_type=None)


def _ignored(value: object) -> None:
    """Accept any value: the field is for OpenAI's bookkeeping."""


Unsupported = Annotated[None, unsupported()]
UnsupportedList = Annotated[None, unsupported([], {})]
UnsupportedFlag = Annotated[None, unsupported(False)]
Ignored = Annotated[None, BeforeValidator(_ignored, json_schema_input_type=Any)]


class StreamOptions(WireModel):
    """What a stream contains besides the text."""

    include_usage: bool = False
    """Send a last chunk with the token counts."""
    continuous_usage_stats: bool = False
    """Send the token counts so far with each chunk, as vLLM does."""
    include_obfuscation: bool = False
    """Accepted for compatibility; chunks are never padded."""


class OpenAIRequest(SamplingFields):
    """What completions and chat have in common."""

    model: ModelName | None = None
    """The model's name, as `/v1/models` lists it. Default: the model that is served."""
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    """Choices per prompt. With a seed, choice i has the seed `seed + i`. Default: 1."""
    max_tokens: TokenCount | None = None
    """Maximum number of generated tokens. Default: the route's, or less if less fits."""
    min_tokens: MinTokenCount | None = None
    """The end token is not sampled before this many tokens. Default: 0."""
    stream: bool | None = None
    """Send the text as it grows, as server-sent events."""
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Accepted for compatibility."""
    stop_token_ids: UnsupportedList = None
    use_beam_search: UnsupportedFlag = None
    length_penalty: Annotated[None, unsupported(1)] = None
    early_stopping: UnsupportedFlag = None
    allowed_token_ids: UnsupportedList = None
    bad_words: UnsupportedList = None
    skip_special_tokens: Annotated[None, unsupported(True)] = None
    spaces_between_special_tokens: Annotated[None, unsupported(True)] = None
    include_stop_str_in_output: UnsupportedFlag = None
    return_token_ids: UnsupportedFlag = None
    prompt_logprobs: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    priority: Annotated[None, unsupported(0)] = None
    metadata: Ignored = None
    store: UnsupportedFlag = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @property
    def sequences_per_prompt(self) -> int:
        """`n`, or its default."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_in_chunks(self) -> bool:
        """Whether each chunk of the stream has the token counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def field_names(self) -> dict[str, str]:
        """This API's names of fields that the runner's errors may name."""
        return {
            "max_new_tokens": "max_tokens",
            "min_new_tokens": "min_tokens",
            "tokens": "prompt",
        }

    def check(self) -> None:
        """Rules over several fields. Raises: InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("requires stream", field="stream_options")

    def for_runner(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        model_temperature: float | None,
        default_tokens: int | None = None,
        fill_context: bool = False,
    ) -> SamplingParams:
        """The sampling parameters, with the API's own defaults."""
        return self.sampling(
            max_new_tokens=max_tokens,
            default_new_tokens=default_tokens,
            fill_context=fill_context,
            min_new_tokens=self.min_tokens,
            logprobs=logprobs,
            default_temperature=(
                DEFAULT_TEMPERATURE if model_temperature is None else model_temperature
            ),
        )


def _as_prompts(value: object) -> object:
    """One text or one list of token ids as a list of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and set(map(type, value)) == {int}:
        return [value]
    return value


Prompts = Annotated[
    list[str | TokenIds],
    Field(min_length=1, max_length=MAX_SEQUENCES),
    BeforeValidator(
        _as_prompts, json_schema_input_type=str | list[str] | TokenIds | list[TokenIds]
    ),
]


class CompletionRequest(OpenAIRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    """A text, texts, token ids, or lists of token ids."""
    best_of: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    """Must equal `n`: choices are not ranked."""
    echo: bool | None = None
    """Begin each text with its prompt."""
    logprobs: LogprobCount | None = None
    """Return each token's log-probability, and those of this many of the most likely tokens."""
    suffix: Annotated[None, unsupported("")] = None
    add_special_tokens: Annotated[None, unsupported(True)] = None

    @override
    def check(self) -> None:
        super().check()
        n = self.sequences_per_prompt
        if self.best_of not in (None, n):
            raise InvalidRequest("must equal n", field="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "cannot be combined with logprobs: prompt tokens have none", field="echo"
            )
        if len(self.prompt) * n > MAX_SEQUENCES:
            raise InvalidRequest(f"prompts times n must be at most {MAX_SEQUENCES}", field="n")

    def prompts(self) -> list[Prompt]:
        """The prompts for the runner."""
        return list(self.prompt)


class ChatTurn(Message):
    """A turn of the conversation, with fields of OpenAI's responses that clients send back."""

    refusal: Unsupported = None
    annotations: UnsupportedList = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: UnsupportedList = None


class TextFormat(WireModel):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(OpenAIRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages[ChatTurn]
    max_completion_tokens: TokenCount | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Return each token's log-probability."""
    top_logprobs: LogprobCount | None = None
    """With `logprobs`: those of this many of the most likely tokens, too."""
    response_format: TextFormat | None = None
    modalities: Annotated[None, unsupported(["text"])] = None
    tools: UnsupportedList = None
    tool_choice: Annotated[None, unsupported("none")] = None
    parallel_tool_calls: Ignored = None
    functions: UnsupportedList = None
    function_call: Annotated[None, unsupported("none")] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Annotated[None, unsupported("none")] = None
    verbosity: Annotated[None, unsupported("medium")] = None
    web_search_options: Unsupported = None
    best_of: Annotated[None, unsupported(1)] = None
    echo: UnsupportedFlag = None
    add_generation_prompt: Annotated[None, unsupported(True)] = None
    continue_final_message: UnsupportedFlag = None
    add_special_tokens: UnsupportedFlag = None
    chat_template: Unsupported = None
    chat_template_kwargs: UnsupportedList = None
    documents: UnsupportedList = None

    @property
    @override
    def field_names(self) -> dict[str, str]:
        names = super().field_names | {"prompt": "messages"}
        if self.max_completion_tokens is not None:
            names["max_new_tokens"] = "max_completion_tokens"
        return names

    @property
    def token_limit(self) -> int | None:
        """Maximum number of generated tokens, by either name."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def logprob_count(self) -> int | None:
        """Number of alternatives per token; None: no logprobs."""
        if not self.logprobs:
            return None
        return 0 if self.top_logprobs is None else self.top_logprobs

    @override
    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("requires logprobs", field="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidRequest(
                "is the newer name of max_tokens; the two must not differ",
                field="max_completion_tokens",
            )
