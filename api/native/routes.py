"""The handlers of the native routes, which `service.py` calls.

They return a ready `Response`, which BentoML passes on, so that successes and errors have the same
format as on all other routes.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, cast

import msgspec
from starlette.responses import Response

from api.http import sse
from api.http.context import current_request
from api.http.errors import as_response
from api.http.json_pieces import encode, json_response
from api.http.schemas import chat_prompt
from api.models.text import Output, TextGeneration, TextModel
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


def handler(
    method: Callable[[S, B], Awaitable[Any]],
) -> Callable[[S, B], Awaitable[Any]]:
    """Decorate a method of the service to return its result or error as a `Response`.

    Fields that are null are left out. BentoML calls it with what `NativeBody` made of the body.
    """

    @as_response
    @functools.wraps(method)
    async def respond(self: S, body: B | InvalidRequest, /) -> Response:
        if isinstance(body, InvalidRequest):
            raise body
        content = await method(self, body)
        if isinstance(content, Response):
            return content
        return json_response(content, omit_null=True)

    return respond


def streamed(method: Any) -> Any:
    """Mark a BentoML API method whose handler returns a stream, for BentoML's clients and docs.

    BentoML marks async generators only as streams, and passes their items through more generators;
    it sends a ready `Response` unchanged.
    """
    method.is_stream = True
    method.output_spec.media_type = sse.MEDIA_TYPE
    return method


async def generate(model: TextModel, body: GenerateRequest) -> GenerateResponse:
    """Continue all prompts of a request."""
    model.require(body.model)
    generation = await model.generate(body.texts(), body.for_runner())
    outputs = await generation.collect(_logprob)
    return GenerateResponse(
        request_id=current_request().request_id,
        model=model.name,
        outputs=[_text(i, output, generation) for i, output in enumerate(outputs)],
    )


async def generate_stream(model: TextModel, body: StreamRequest) -> Response:
    """Continue one prompt, as server-sent events. Raises: errors before the first token."""
    model.require(body.model)
    generation = await model.generate([body.prompt], body.for_runner())
    return await sse.stream_response(_frames(model, generation), error_event="error")


async def tokenize(model: TextModel, body: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text or a conversation."""
    model.require(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", field="prompt")
    prompt = chat_prompt(body.messages) if body.messages else body.prompt or ""
    tokens = await model.tokenize(prompt, add_special_tokens=body.add_special_tokens)
    max_model_len = model.info.max_model_len if model.info else 0
    return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=max_model_len)


async def detokenize(model: TextModel, body: DetokenizeRequest) -> DetokenizeResponse:
    """The text of token ids."""
    model.require(body.model)
    text = await model.detokenize(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return DetokenizeResponse(text=text)


async def _frames(model: TextModel, generation: TextGeneration) -> AsyncIterator[bytes]:
    request_id = current_request().request_id
    async for index, delta in generation:
        yield sse.frame(_piece(request_id, index, delta), omit_null=True)
    totals = StreamTotals(
        request_id=request_id,
        model=model.name,
        prompt_length=generation.usage_prompt_tokens,
        generated_length=generation.generated_tokens,
        finish_reason=cast(FinishReason, delta.finish_reason),
    )
    yield sse.frame(totals)


def _piece(request_id: str, index: int, delta: TextDelta) -> StreamFrame:
    return StreamFrame(
        request_id=request_id,
        index=index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=None if delta.logprobs is None else [_logprob(each) for each in delta.logprobs],
        finish_reason=delta.finish_reason,
    )


def _text(index: int, output: Output[msgspec.Raw], generation: TextGeneration) -> GeneratedText:
    return GeneratedText(
        index=index,
        generated_text=output.text,
        prompt_length=generation.prompt_tokens[index],
        generated_length=len(output.token_ids),
        finish_reason=output.finish_reason,
        logprobs=output.logprobs,
    )


def _logprob(token: TokenLogprob) -> msgspec.Raw:
    top = [_fields(alternative) for alternative in token.top]
    return msgspec.Raw(encode(Logprob(**_fields(token), top=top)))


def _fields(token: TokenLogprob) -> Alternative:
    return Alternative(
        token=token.token,
        token_id=token.token_id,
        logprob=token.logprob,
        bytes=list(token.token_bytes),
    )
