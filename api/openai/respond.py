"""From an OpenAI-style body to its response, the same for completions and chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar
from uuid import uuid4

from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import Response

from api.http import sse
from api.http.json_pieces import json_response
from api.models.text import Output, TextGeneration, TextModel
from api.openai.requests import OpenAIRequest
from api.openai.responses import Usage
from runners.contracts.errors import RequestError
from runners.contracts.text import Prompt, SamplingParams, TextDelta, TokenLogprob

LogprobT = TypeVar("LogprobT")


class ResponseMeta(NamedTuple):
    """The fields that every chunk of one response repeats."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str


class ResponseFormat(Protocol[LogprobT]):
    """The response bodies and chunks of a route."""

    id_prefix: str

    def logprob(self, token: TokenLogprob) -> LogprobT:
        """What a response has of a token's log-probabilities, encoded if possible."""
        ...

    def whole(self, meta: ResponseMeta, outputs: list[Output[LogprobT]], usage: Usage) -> BaseModel:
        """The body of a response that is not streamed."""
        ...

    def first_chunks(self, meta: ResponseMeta, index: int) -> Sequence[BaseModel]:
        """Chunks that precede the text of a sequence."""
        ...

    def chunks(self, meta: ResponseMeta, index: int, delta: TextDelta) -> Sequence[BaseModel]:
        """Chunks of a delta; none while the detokeniser waits for the rest of a character."""
        ...

    def usage_chunk(self, meta: ResponseMeta, usage: Usage) -> BaseModel:
        """The chunk of token counts."""
        ...


@contextmanager
def rename_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the fields that errors name, from the runner's names to those of this API."""
    try:
        yield
    except RequestError as error:
        field = names.get(error.field or "", error.field)
        raise type(error)(error.reason, field=field) from None


async def respond(
    model: TextModel,
    body: OpenAIRequest,
    response_format: ResponseFormat[LogprobT],
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
) -> Response:
    """Generate text; returns the whole or a stream. Raises: errors before the first token."""
    with rename_fields(body.field_names):
        generation = await model.generate(prompts, sampling, n=body.sequences_per_prompt)
    request_id = f"{response_format.id_prefix}-{uuid4().hex}"
    meta = ResponseMeta(request_id, int(time.time()), model.name)
    if body.stream:
        frames = _frames(generation, response_format, meta, body)
        return await sse.stream_response(frames, error_event=None)
    outputs = await generation.collect(response_format.logprob)
    return json_response(response_format.whole(meta, outputs, _usage(generation)))


async def _frames(
    generation: TextGeneration,
    response_format: ResponseFormat[LogprobT],
    meta: ResponseMeta,
    body: OpenAIRequest,
) -> AsyncIterator[bytes]:
    with_usage, continuous = body.wants_usage_chunk, body.wants_usage_in_chunks
    chunks: list[BaseModel] = []
    for index in range(len(generation)):
        chunks += response_format.first_chunks(meta, index)
    async for index, delta in generation:
        chunks += response_format.chunks(meta, index, delta)
        for chunk in chunks:
            fields = dict(chunk)
            if continuous:
                fields["usage"] = _usage(generation)
            elif not with_usage:  # with it every chunk has the field, null in all but the last
                del fields["usage"]
            yield sse.frame(fields)
        chunks = []
    if with_usage:
        yield sse.frame(response_format.usage_chunk(meta, _usage(generation)))
    yield format_sse_event(data_str="[DONE]")


def _usage(generation: TextGeneration) -> Usage:
    prompt, completion = generation.usage_prompt_tokens, generation.generated_tokens
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
