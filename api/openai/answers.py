"""The way from an OpenAI-style body to its answer, the same for completions and chat."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from uuid import uuid4

from pydantic import BaseModel
from starlette.responses import Response

from api.http import sse
from api.models.text import Generation, Output, TextModel
from api.openai.requests import OpenAIRequest
from api.openai.responses import Usage
from runners.contracts.errors import RequestError
from runners.contracts.text import Prompt, SamplingParams, TextDelta


class Head(NamedTuple):
    """What every part of one answer repeats."""

    id: str
    created: int
    model: str


class Dialect(Protocol):
    """How a route words its answers."""

    id_prefix: str

    def answer(self, head: Head, outputs: list[Output], usage: Usage) -> BaseModel:
        """The whole answer."""
        ...

    def opening(self, head: Head, index: int) -> Sequence[BaseModel]:
        """Chunks that precede the text of a sequence."""
        ...

    def pieces(self, head: Head, index: int, delta: TextDelta) -> Sequence[BaseModel]:
        """Chunks for a delta; none while the detokeniser waits."""
        ...

    def closing(self, head: Head, usage: Usage) -> BaseModel:
        """The chunk of token counts."""
        ...


@contextmanager
def in_terms_of(body: OpenAIRequest) -> Iterator[None]:
    """Call the fields in the runner's complaints what this client calls them."""
    names = body.field_names
    try:
        yield
    except RequestError as error:
        field = names.get(error.field or "", error.field)
        raise type(error)(error.reason, field=field) from None


async def respond(
    model: TextModel,
    body: OpenAIRequest,
    dialect: Dialect,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
) -> Response:
    """Generate, and answer whole or as a stream. Raises: what happens before the first token."""
    with in_terms_of(body):
        generation = await model.generate(prompts, sampling, n=body.n or 1)
    head = Head(f"{dialect.id_prefix}-{uuid4().hex}", int(time.time()), model.name)
    if body.stream:
        frames = _frames(generation, dialect, head, with_usage=body.wants_usage_chunk)
        return await sse.stream_response(sse.guarded(frames, error_event=None))
    outputs = await generation.collect()
    answer = dialect.answer(head, outputs, _usage(generation))
    return Response(answer.model_dump_json(), media_type="application/json")


async def _frames(
    generation: Generation, dialect: Dialect, head: Head, *, with_usage: bool
) -> AsyncIterator[str]:
    # With include_usage every chunk has the field, null in all but the last.
    exclude = None if with_usage else {"usage"}
    chunks: list[BaseModel] = []
    for index in range(len(generation)):
        chunks += dialect.opening(head, index)
    async for index, delta in generation:
        chunks += dialect.pieces(head, index, delta)
        for chunk in chunks:
            yield sse.frame(chunk.model_dump_json(exclude=exclude))
        chunks = []
    if with_usage:
        yield sse.frame(dialect.closing(head, _usage(generation)).model_dump_json())
    yield sse.frame("[DONE]")


def _usage(generation: Generation) -> Usage:
    prompt, completion = generation.usage_prompt_tokens, generation.generated_tokens
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
