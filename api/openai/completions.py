"""`POST /v1/completions`."""

from __future__ import annotations

from starlette.responses import Response

from api.models.text import Output, TextModel
from api.openai.answers import Head, in_terms_of, respond
from api.openai.requests import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from api.openai.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from runners.contracts.text import FinishReason, TextDelta, TokenLogprob


async def create_completion(model: TextModel, body: CompletionRequest) -> Response:
    """Continue prompts."""
    model.require(body.model)
    body.check()
    with in_terms_of(body):
        echoes = await _echoes(model, body)
    sampling = body.for_runner(
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs,
        model_temperature=model.default_temperature,
    )
    return await respond(model, body, _CompletionDialect(echoes), body.prompts(), sampling)


async def _echoes(model: TextModel, body: CompletionRequest) -> list[str]:
    """What precedes each sequence's text; token ids are turned into text first."""
    n = body.n or 1
    if not body.echo:
        return [""] * (len(body.prompt) * n)
    texts = [
        prompt
        if isinstance(prompt, str)
        else await model.detokenize(prompt, skip_special_tokens=False)
        for prompt in body.prompt
    ]
    return [text for text in texts for _ in range(n)]


class _CompletionDialect:
    id_prefix = "cmpl"

    def __init__(self, echoes: list[str]) -> None:
        self._echoes = echoes
        self._offsets = [0] * len(echoes)

    def answer(self, head: Head, outputs: list[Output], usage: Usage) -> Completion:
        choices = [
            self._choice(index, self._echoes[index] + out.text, out.logprobs, out.finish_reason)
            for index, out in enumerate(outputs)
        ]
        return Completion(**head._asdict(), choices=choices, usage=usage)

    def opening(self, head: Head, index: int) -> list[Completion]:
        if not self._echoes[index]:
            return []
        return [self._chunk(head, self._choice(index, self._echoes[index], None, None))]

    def pieces(self, head: Head, index: int, delta: TextDelta) -> list[Completion]:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return []
        choice = self._choice(index, delta.text, delta.logprobs, delta.finish_reason)
        return [self._chunk(head, choice)]

    def closing(self, head: Head, usage: Usage) -> Completion:
        return Completion(**head._asdict(), choices=[], usage=usage)

    def _chunk(self, head: Head, choice: CompletionChoice) -> Completion:
        return Completion(**head._asdict(), choices=[choice])

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: list[TokenLogprob] | None,
        finish_reason: FinishReason | None,
    ) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if logprobs is None else self._logprobs(index, logprobs),
            finish_reason=finish_reason,
        )

    def _logprobs(self, index: int, tokens: list[TokenLogprob]) -> CompletionLogprobs:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.token)
        return CompletionLogprobs(
            tokens=[name_of(token) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[alternatives(token) for token in tokens],
            text_offset=offsets,
        )


def alternatives(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens; as in the API, the sampled one is always among them."""
    likeliest = {name_of(top): top.logprob for top in reversed(token.top)}
    return likeliest | {name_of(token): token.logprob}


def name_of(token: TokenLogprob) -> str:
    r"""A token's text; for a piece of a character its bytes, as the API does: `bytes:\xe2\x80`."""
    if token.token.encode() == token.token_bytes:
        return token.token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token_bytes)
