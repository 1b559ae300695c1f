"""From prompts to text: one or many sequences of one request, whole or as they grow.

All routes come through here, so admission, the deadline, clean-up and metrics exist once. What a
request starts is closed with it (`context.RequestContext.resources`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from api.http import metrics
from api.http.context import RequestContext, current_request
from api.models.base import HeldModel
from api.models.streams import MergedStream, open_all, truncated
from runners.contracts.runner import Stream
from runners.contracts.text import (
    FinishReason,
    GenerationRequest,
    ModelInfo,
    Prompt,
    SamplingParams,
    TextDelta,
    TextRunner,
    TokenLogprob,
)

MAX_SEQUENCES = 128
"""Sequences one request may ask for: prompts times `n`."""

_sequence_numbers = count(1)


@dataclass(slots=True)
class Output:
    """A finished sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason = "stop"


class TextModel(HeldModel[TextRunner]):
    """A text model as the routes see it."""

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        return self.runner.info

    @property
    def default_temperature(self) -> float | None:
        """The temperature of the model's own generation config, if it names one."""
        return self.info.default_temperature if self.info is not None else None

    async def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, n: int = 1
    ) -> Generation:
        """Start `n` sequences for each prompt; those of prompt i are i*n ... i*n + n-1.

        Raises: Overloaded, DeadlineExceeded and what `TextRunner.submit` does.
        """
        request = current_request()
        request.resources.enter_context(self.admission.admit(len(prompts) * n))
        requests = [
            GenerationRequest(
                request_id=f"{request.request_id}-{next(_sequence_numbers)}",
                prompt=prompt,
                sampling=_with_own_seed(sampling, i),
            )
            for prompt in prompts
            for i in range(n)
        ]
        async with request.within_deadline():
            streams = await open_all([self.runner.submit(each) for each in requests])
        generation = Generation(request, streams, n)
        request.resources.push_async_callback(generation.aclose)
        return generation

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text or a conversation."""
        request = current_request()
        with self.admission.admit(1):
            async with request.within_deadline():
                return await self.runner.tokenize(prompt, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        request = current_request()
        with self.admission.admit(1):
            async with request.within_deadline():
                return await self.runner.detokenize(
                    token_ids, skip_special_tokens=skip_special_tokens
                )


class Generation:
    """The running sequences of one request; iterate it, or `collect` it, once."""

    def __init__(self, request: RequestContext, streams: list[Stream[TextDelta]], n: int) -> None:
        self._request = request
        self._streams = streams
        self._clocks = [_Clock(request) for _ in streams]
        self._merged = MergedStream(streams)
        self.prompt_tokens = [stream.prompt_tokens for stream in streams]
        """Per sequence."""
        self.usage_prompt_tokens = sum(self.prompt_tokens[::n])
        """Over all prompts, each counted once."""
        metrics.PROMPT_TOKENS.labels(request.route).inc(self.usage_prompt_tokens)

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, over all sequences."""
        return sum(clock.tokens for clock in self._clocks)

    async def __aiter__(self) -> AsyncIterator[tuple[int, TextDelta]]:
        """Yield what comes, with the index of its sequence, until all have finished.

        Raises: RunnerUnavailable, DeadlineExceeded, EngineFailure.
        """
        unfinished = len(self._streams)
        events = aiter(self._merged)
        while unfinished:
            async with self._request.within_deadline():
                item = await anext(events, None)
            if item is None:
                raise truncated()
            index, delta = item
            self._clocks[index].saw(delta)
            unfinished -= delta.finished
            yield item

    async def collect(self) -> list[Output]:
        """Wait for all sequences. Raises: as iteration."""
        outputs = [Output() for _ in self._streams]
        texts: list[list[str]] = [[] for _ in self._streams]
        async for index, delta in self:
            output = outputs[index]
            texts[index].append(delta.text)
            output.token_ids += delta.token_ids
            if delta.logprobs is not None:
                output.logprobs = [*(output.logprobs or []), *delta.logprobs]
            output.finish_reason = delta.finish_reason or output.finish_reason
        for output, parts in zip(outputs, texts, strict=True):
            output.text = "".join(parts)
        return outputs

    async def aclose(self) -> None:
        """Abort what still runs."""
        await self._merged.aclose()
        for clock in self._clocks:
            clock.stop()


class _Clock:
    """When a sequence's tokens came, for the metrics."""

    def __init__(self, request: RequestContext) -> None:
        self._request = request
        self._first: float | None = None
        self._last = 0.0
        self._end: str | None = None
        self.tokens = 0

    def saw(self, delta: TextDelta) -> None:
        """Take note of a delta."""
        if delta.token_ids:
            self._last = asyncio.get_running_loop().time()
            self.tokens += len(delta.token_ids)
            if self._first is None:
                self._first = self._last
        self._end = delta.finish_reason

    def stop(self) -> None:
        """Report; the sequence has ended."""
        route = self._request.route
        metrics.SEQUENCES.labels(route, self._end or "aborted").inc()
        if self._first is None:
            return
        metrics.GENERATED_TOKENS.labels(route).inc(self.tokens)
        metrics.FIRST_TOKEN.labels(route).observe(self._first - self._request.arrived)
        if self.tokens > 1:
            mean = (self._last - self._first) / (self.tokens - 1)
            metrics.PER_TOKEN.labels(route).observe(mean)


def _with_own_seed(sampling: SamplingParams, i: int) -> SamplingParams:
    if sampling.seed is None or i == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + i) % 2**63)
