"""What the native routes of `service.py` do.

Handlers answer with a ready `Response`: BentoML passes it through, so a success and an error are
written here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from starlette.responses import Response

from api.http import sse
from api.http.context import current_request
from api.http.errors import as_response, error_body, error_headers, kind_of
from api.http.schemas import chat_prompt
from api.models.served import Served
from api.models.text import Generation, Output, TextModel
from api.native.schemas import (
    Alternative,
    DetokenizeRequest,
    DetokenizeResponse,
    GeneratedText,
    GenerateRequest,
    GenerateResponse,
    Logprob,
    NativeBody,
    StreamFrame,
    StreamRequest,
    StreamTotals,
    TokenizeRequest,
    TokenizeResponse,
)
from runners.contracts.errors import InvalidRequest
from runners.contracts.text import FinishReason, TextDelta, TokenLogprob

S = TypeVar("S")
B = TypeVar("B", bound=NativeBody)


def answers(
    handler: Callable[[S, B], Awaitable[BaseModel | Response]],
) -> Callable[[S, B], Awaitable[Any]]:
    """Turn a handler's result or error into a `Response`, leaving out what is null."""

    @as_response
    @functools.wraps(handler)
    async def answer(self: S, body: B, /) -> Response:
        body.require_valid()
        content = await handler(self, body)
        if isinstance(content, Response):
            return content
        return Response(content.model_dump_json(exclude_none=True), media_type="application/json")

    return answer


async def generate(model: TextModel, body: GenerateRequest) -> GenerateResponse:
    """Continue all prompts of a request."""
    model.require(body.model)
    generation = await model.generate(body.texts(), body.for_runner())
    outputs = await generation.collect()
    return GenerateResponse(
        request_id=current_request().request_id,
        model=model.name,
        outputs=[_whole(i, output, generation) for i, output in enumerate(outputs)],
    )


async def generate_stream(served: Served, body: StreamRequest, response: Any) -> AsyncIterator[str]:
    """Server-sent events for one prompt; `response` is BentoML's, read after the first of them.

    An error before the first token becomes the whole answer, with its own status.
    """
    try:
        body.require_valid()
        model = served.text
        model.require(body.model)
        generation = await model.generate([body.prompt], body.for_runner())
        response.headers.update(sse.HEADERS)
        async for each in sse.guarded(_frames(model, generation), error_event="error"):
            yield each
    except Exception as error:
        response.status_code = kind_of(error).status
        response.headers.update({"Content-Type": "application/json", **error_headers(error)})
        yield error_body(error)


async def tokenize(model: TextModel, body: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text or a conversation."""
    model.require(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", field="prompt")
    prompt = chat_prompt(body.messages) if body.messages else body.prompt or ""
    tokens = await model.tokenize(prompt, add_special_tokens=body.add_special_tokens)
    longest = model.info.max_model_len if model.info else 0
    return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=longest)


async def detokenize(model: TextModel, body: DetokenizeRequest) -> DetokenizeResponse:
    """The text of token ids."""
    model.require(body.model)
    text = await model.detokenize(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return DetokenizeResponse(text=text)


async def _frames(model: TextModel, generation: Generation) -> AsyncIterator[str]:
    request_id = current_request().request_id
    async for index, delta in generation:
        yield sse.frame(_piece(request_id, index, delta).model_dump_json(exclude_none=True))
    totals = StreamTotals(
        request_id=request_id,
        model=model.name,
        prompt_length=generation.usage_prompt_tokens,
        generated_length=generation.generated_tokens,
        finish_reason=cast(FinishReason, delta.finish_reason),
    )
    yield sse.frame(totals.model_dump_json())


def _piece(request_id: str, index: int, delta: TextDelta) -> StreamFrame:
    return StreamFrame(
        request_id=request_id,
        index=index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs),
        finish_reason=delta.finish_reason,
    )


def _whole(index: int, output: Output, generation: Generation) -> GeneratedText:
    return GeneratedText(
        index=index,
        generated_text=output.text,
        prompt_length=generation.prompt_tokens[index],
        generated_length=len(output.token_ids),
        finish_reason=output.finish_reason,
        logprobs=_logprobs(output.logprobs),
    )


def _logprobs(tokens: list[TokenLogprob] | None) -> list[Logprob] | None:
    if tokens is None:
        return None
    return [
        Logprob(**_plain(token), top=[Alternative(**_plain(top)) for top in token.top])
        for token in tokens
    ]


def _plain(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "token_id": token.token_id,
        "logprob": token.logprob,
        "bytes": list(token.token_bytes),
    }
