"""From an OpenAI-style body to its response, the same for completions and chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from uuid import uuid4

from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import Response

from api.http import sse
from api.models.text import Output, TextGeneration, TextModel
from api.openai.requests import OpenAIRequest
from api.openai.responses import Usage
from runners.contracts.errors import RequestError
from runners.contracts.text import Prompt, SamplingParams, TextDelta


class ResponseMeta(NamedTuple):
    """The fields that every chunk of one response repeats."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str


class ResponseFormat(Protocol):
    """The response bodies and chunks of a route."""

    id_prefix: str

    def whole(self, meta: ResponseMeta, outputs: list[Output], usage: Usage) -> BaseModel:
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
    response_format: ResponseFormat,
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
    outputs = await generation.collect()
    whole = response_format.whole(meta, outputs, _usage(generation))
    return Response(whole.model_dump_json(), media_type="application/json")


async def _frames(
    generation: TextGeneration,
    response_format: ResponseFormat,
    meta: ResponseMeta,
    body: OpenAIRequest,
) -> AsyncIterator[bytes]:
    with_usage, continuous = body.wants_usage_chunk, body.wants_usage_in_chunks
    # With include_usage every chunk has the field, null in all but the last.
    exclude = None if with_usage or continuous else {"usage"}
    chunks: list[BaseModel] = []
    for index in range(len(generation)):
        chunks += response_format.first_chunks(meta, index)
    async for index, delta in generation:
        chunks += response_format.chunks(meta, index, delta)
        for chunk in chunks:
            if continuous:
                chunk = chunk.model_copy(update={"usage": _usage(generation)})
            yield format_sse_event(data_str=chunk.model_dump_json(exclude=exclude))
        chunks = []
    if with_usage:
        chunk = response_format.usage_chunk(meta, _usage(generation))
        yield format_sse_event(data_str=chunk.model_dump_json())
    yield format_sse_event(data_str="[DONE]")


def _usage(generation: TextGeneration) -> Usage:
    prompt, completion = generation.usage_prompt_tokens, generation.generated_tokens
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
