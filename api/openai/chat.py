"""`POST /v1/chat/completions`."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from api.http.json_pieces import encode
from api.http.schemas import chat_prompt
from api.models.text import Output, TextModel
from api.openai.requests import ChatRequest
from api.openai.respond import ResponseMeta, respond
from api.openai.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    TopLogprob,
    Usage,
)
from runners.contracts.text import TextDelta, TokenLogprob


async def create_chat_completion(model: TextModel, body: ChatRequest) -> Response:
    """Generate the next turn of a conversation."""
    model.require(body.model)
    body.check()
    sampling = body.for_runner(
        max_tokens=body.token_limit,
        fill_context=True,
        logprobs=body.logprob_count,
        model_temperature=model.default_temperature,
    )
    return await respond(model, body, _ChatFormat(), [chat_prompt(body.messages)], sampling)


class _ChatFormat:
    id_prefix = "chatcmpl"

    def logprob(self, token: TokenLogprob) -> msgspec.Raw:
        fields = _fields(token)
        top = [_fields(alternative) for alternative in token.top]
        return msgspec.Raw(encode(ChatLogprob(**fields, top_logprobs=top)))

    def whole(
        self, meta: ResponseMeta, outputs: list[Output[msgspec.Raw]], usage: Usage
    ) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=output.text),
                logprobs=None if output.logprobs is None else ChatLogprobs(content=output.logprobs),
                finish_reason=output.finish_reason,
            )
            for index, output in enumerate(outputs)
        ]
        return ChatCompletion(**meta._asdict(), choices=choices, usage=usage)

    def first_chunks(self, meta: ResponseMeta, index: int) -> list[ChatCompletionChunk]:
        delta = ChatDelta(role="assistant", content="")
        return [_chunk(meta, ChatChunkChoice(index=index, delta=delta))]

    def chunks(self, meta: ResponseMeta, index: int, delta: TextDelta) -> list[ChatCompletionChunk]:
        choices = []
        if delta.text or delta.logprobs:
            logprobs = None
            if delta.logprobs is not None:
                logprobs = ChatLogprobs(content=[self.logprob(token) for token in delta.logprobs])
            content = ChatDelta(content=delta.text)
            choices.append(ChatChunkChoice(index=index, delta=content, logprobs=logprobs))
        if delta.finish_reason is not None:
            last = ChatDelta()
            choices.append(
                ChatChunkChoice(index=index, delta=last, finish_reason=delta.finish_reason)
            )
        return [_chunk(meta, choice) for choice in choices]

    def usage_chunk(self, meta: ResponseMeta, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(**meta._asdict(), choices=[], usage=usage)


def _chunk(meta: ResponseMeta, choice: ChatChunkChoice) -> ChatCompletionChunk:
    return ChatCompletionChunk(**meta._asdict(), choices=[choice])


def _fields(token: TokenLogprob) -> TopLogprob:
    return TopLogprob(token=token.token, logprob=token.logprob, bytes=list(token.token_bytes))
