"""`POST /v1/completions`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from starlette.responses import Response

from api.http.json_pieces import encode
from api.models.text import Output, TextModel
from api.openai.requests import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from api.openai.respond import ResponseMeta, rename_fields, respond
from api.openai.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from runners.contracts.text import FinishReason, TextDelta, TokenLogprob


async def create_completion(model: TextModel, body: CompletionRequest) -> Response:
    """Continue prompts."""
    model.require(body.model)
    body.check()
    with rename_fields(body.field_names):
        prefixes = await _prefixes(model, body)
    sampling = body.for_runner(
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs,
        model_temperature=model.default_temperature,
    )
    return await respond(model, body, _CompletionFormat(prefixes), body.prompts(), sampling)


async def _prefixes(model: TextModel, body: CompletionRequest) -> list[str]:
    """The text that precedes each sequence: with `echo`, its prompt."""
    n = body.sequences_per_prompt
    if not body.echo:
        return [""] * (len(body.prompt) * n)
    texts = [
        prompt
        if isinstance(prompt, str)
        else await model.detokenize(prompt, skip_special_tokens=False)
        for prompt in body.prompt
    ]
    return [text for text in texts for _ in range(n)]


class _Logprob(NamedTuple):
    """A token's items of the parallel lists."""

    token: str
    logprob: float
    top: msgspec.Raw
    text_offset: int


class _CompletionFormat:
    id_prefix = "cmpl"

    def __init__(self, prefixes: list[str]) -> None:
        self._prefixes = prefixes

    def logprob(self, token: TokenLogprob) -> _Logprob:
        top = msgspec.Raw(encode(alternatives(token)))
        return _Logprob(name_of(token), token.logprob, top, token.text_offset)

    def whole(
        self, meta: ResponseMeta, outputs: list[Output[_Logprob]], usage: Usage
    ) -> Completion:
        choices = [
            self._choice(
                index,
                self._prefixes[index] + output.text,
                output.logprobs,
                output.finish_reason,
            )
            for index, output in enumerate(outputs)
        ]
        return Completion(**meta._asdict(), choices=choices, usage=usage)

    def first_chunks(self, meta: ResponseMeta, index: int) -> list[Completion]:
        if not self._prefixes[index]:
            return []
        return [self._chunk(meta, self._choice(index, self._prefixes[index], None, None))]

    def chunks(self, meta: ResponseMeta, index: int, delta: TextDelta) -> list[Completion]:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return []
        logprobs = None
        if delta.logprobs is not None:
            logprobs = [self.logprob(token) for token in delta.logprobs]
        choice = self._choice(index, delta.text, logprobs, delta.finish_reason)
        return [self._chunk(meta, choice)]

    def usage_chunk(self, meta: ResponseMeta, usage: Usage) -> Completion:
        return Completion(**meta._asdict(), choices=[], usage=usage)

    def _chunk(self, meta: ResponseMeta, choice: CompletionChoice) -> Completion:
        return Completion(**meta._asdict(), choices=[choice])

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: list[_Logprob] | None,
        finish_reason: FinishReason | None,
    ) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if logprobs is None else _logprobs(logprobs),
            finish_reason=finish_reason,
        )


def _logprobs(tokens: list[_Logprob]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[token.top for token in tokens],
        text_offset=[token.text_offset for token in tokens],
    )


def alternatives(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and their log-probabilities, always with the sampled token."""
    most_likely = {name_of(top): top.logprob for top in reversed(token.top)}
    return most_likely | {name_of(token): token.logprob}


def name_of(token: TokenLogprob) -> str:
    r"""A token's text; its bytes if it is a piece of a character, such as `bytes:\xe2\x80`."""
    if token.token.encode() == token.token_bytes:
        return token.token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token_bytes)
