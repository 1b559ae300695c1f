"""FakeTextRunner: a TextRunner without ranks, for tests of what is above the runners."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Self

from runners.contracts.errors import InvalidRequest, RunnerUnavailable
from runners.contracts.runner import RunnerHealth, RunnerState
from runners.contracts.text import (
    GenerationRequest,
    ModelInfo,
    Prompt,
    SamplingParams,
    TextDelta,
    TokenLogprob,
)

VOCAB_SIZE = 256
DEFAULT_NEW_TOKENS = 16


class FakeTextRunner:
    """Generates tokens that prompt and seed determine, one for each turn of the event loop.

    With `at_once`, all tokens are there at once, as for a client that reads late.
    """

    name = "fake"
    version = "1"
    task = "text-generation"
    max_concurrency = 8
    step_timeout = 300.0

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.devices = ["cpu"]
        self.running: set[str] = set()
        """The ids of the accepted requests that have not ended."""
        self.accepting = asyncio.Event()
        """Clear it, and submitted requests wait."""
        self.accepting.set()
        self.lost = False
        """Whether the ranks are lost: all running requests fail."""
        self.info = ModelInfo(
            architecture="Fake",
            engine="fake",
            parameters=0,
            dtype="float32",
            devices=["cpu"],
            max_context=4096,
            vocab_size=VOCAB_SIZE,
            max_kv_tokens=4096,
            has_chat_template=False,
        )

    def health(self) -> RunnerHealth:
        """Always ready."""
        return RunnerHealth(state=RunnerState.READY, detail="fake", running=len(self.running))

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to stop."""

    async def submit(self, request: GenerationRequest) -> FakeStream:
        """A stream of exactly `max_new_tokens` tokens."""
        await self.accepting.wait()
        prompt_ids = await self.tokenize(request.prompt)
        self.running.add(request.request_id)
        return FakeStream(self, request, prompt_ids)

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The UTF-8 bytes of a text."""
        ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        if not isinstance(ids, list):
            raise InvalidRequest("the model has no chat template")
        if any(token >= VOCAB_SIZE for token in ids):
            raise InvalidRequest("a token id is outside the vocabulary")
        return ids

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of UTF-8 bytes."""
        return bytes(token_ids).decode(errors="replace")


class FakeStream:
    """The deltas of one request."""

    def __init__(
        self, runner: FakeTextRunner, request: GenerationRequest, prompt_ids: list[int]
    ) -> None:
        self.request_id = request.request_id
        self.prompt_tokens = len(prompt_ids)
        self.max_new_tokens = request.sampling.max_new_tokens or DEFAULT_NEW_TOKENS
        self._runner = runner
        self._deltas = self._generate(request, prompt_ids)

    async def _generate(
        self, request: GenerationRequest, prompt_ids: list[int]
    ) -> AsyncIterator[TextDelta]:
        sampling = request.sampling
        rng = random.Random(f"{prompt_ids} {sampling.seed}")
        count = self.max_new_tokens
        for i in range(count):
            if not self._runner.at_once:
                await asyncio.sleep(0)
            if self._runner.lost:
                raise RunnerUnavailable("a rank was lost")
            token = rng.randrange(32, 127)
            yield TextDelta(
                request_id=self.request_id,
                text=chr(token),
                token_ids=[token],
                logprobs=_logprobs(token, i, sampling),
                finish_reason="length" if i == count - 1 else None,
            )
        self._runner.running.discard(self.request_id)

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        return self._deltas

    async def aclose(self) -> None:
        """Abort the request."""
        self._runner.running.discard(self.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


def _logprobs(token: int, offset: int, sampling: SamplingParams) -> list[TokenLogprob] | None:
    """The token, which is as likely as each of the alternatives."""
    if sampling.logprobs is None:
        return None
    ids = [(token + i) % 128 for i in range(sampling.logprobs)]
    top = tuple(
        TokenLogprob(token_id=i, token=chr(i), token_bytes=bytes([i]), logprob=-0.5) for i in ids
    )
    return [
        TokenLogprob(
            token_id=token,
            token=chr(token),
            token_bytes=bytes([token]),
            logprob=-0.5,
            text_offset=offset,
            top=top,
        )
    ]
