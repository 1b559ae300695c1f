"""From prompts to text: one or many sequences per request, whole or as they grow.

All text routes call this module, so admission, deadline, clean-up and metrics exist once. What a
request starts is closed with it (`RequestContext.resources`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, overload

from api.http import metrics
from api.http.admission import Admission
from api.http.context import RequestContext, current_request
from api.http.schemas import nth_seed
from api.models.base import ServedModel
from api.models.streams import MergedStream, open_all
from runners.contracts.errors import InvalidRequest
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
"""Sequences per request: prompts times `n`."""

LogprobT = TypeVar("LogprobT")


@dataclass(slots=True)
class Output(Generic[LogprobT]):
    """A finished sequence; `logprobs` has an item for each token, if the request asks for it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobT] | None = None
    finish_reason: FinishReason = "stop"


class TextModel(ServedModel[TextRunner]):
    """A text model as the routes see it.

    `max_logprobs`: the log-probabilities that one request may ask for.
    """

    def __init__(
        self,
        runner: TextRunner,
        admission: Admission,
        *,
        aliases: Iterable[str] = (),
        max_logprobs: int = 1_000_000,
    ) -> None:
        super().__init__(runner, admission, aliases=aliases)
        self.max_logprobs = max_logprobs

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None before they were ready once."""
        return self.runner.info

    @property
    def default_temperature(self) -> float | None:
        """The temperature of the model's own generation config, if it has one."""
        return self.info.default_temperature if self.info is not None else None

    async def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, n: int = 1
    ) -> TextGeneration:
        """Start `n` sequences for each prompt; those of prompt i are i*n ... i*n + n-1.

        Raises: Overloaded, DeadlineExceeded, InvalidRequest for more than `max_logprobs`, and what
        `TextRunner.submit` does.
        """
        context = current_request()
        context.resources.enter_context(self.admission.admit(len(prompts) * n))
        requests = [
            GenerationRequest(
                request_id=context.new_part_id(), prompt=prompt, sampling=_nth(sampling, i)
            )
            for prompt in prompts
            for i in range(n)
        ]
        async with context.within_deadline():
            streams = await open_all([self.runner.submit(request) for request in requests])
        generation = TextGeneration(context, streams, n)
        context.resources.push_async_callback(generation.aclose)
        if sampling.logprobs is not None:
            self._check_logprobs([stream.max_new_tokens for stream in streams], sampling.logprobs)
        return generation

    def _check_logprobs(self, token_limits: list[int], alternatives: int) -> None:
        count = sum(token_limits) * (alternatives + 1)
        if count > self.max_logprobs:
            raise InvalidRequest(
                f"{len(token_limits)} sequences of up to {max(token_limits)} tokens, with the "
                f"log-probabilities of each token and of {alternatives} alternatives, may have "
                f"{count}; a request may ask for {self.max_logprobs}",
                field="max_new_tokens",
            )

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text or a conversation."""
        with self.admission.admit(1):
            async with current_request().within_deadline():
                return await self.runner.tokenize(prompt, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        with self.admission.admit(1):
            async with current_request().within_deadline():
                return await self.runner.detokenize(
                    token_ids, skip_special_tokens=skip_special_tokens
                )


class TextGeneration:
    """The running sequences of one HTTP request; iterate it, or `collect` it, once."""

    def __init__(self, context: RequestContext, streams: list[Stream[TextDelta]], n: int) -> None:
        self._context = context
        self._stream = MergedStream(streams)
        self._timers = [_SequenceTimer(context) for _ in streams]
        self._unfinished = len(streams)
        self.prompt_tokens = [stream.prompt_tokens for stream in streams]
        """Per sequence."""
        self.usage_prompt_tokens = sum(self.prompt_tokens[::n])
        """Over all prompts, each counted once."""
        metrics.PROMPT_TOKENS.labels(context.route).inc(self.usage_prompt_tokens)

    def __len__(self) -> int:
        return len(self._timers)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, over all sequences."""
        return sum(timer.tokens for timer in self._timers)

    def __aiter__(self) -> AsyncIterator[tuple[int, TextDelta]]:
        """Yield deltas, each with the index of its sequence, until all sequences are finished.

        Raises: RunnerUnavailable, DeadlineExceeded, EngineFailure.
        """
        return self

    async def __anext__(self) -> tuple[int, TextDelta]:
        if not self._unfinished:
            raise StopAsyncIteration
        async with self._context.within_deadline():
            index, delta = await self._stream.next()
        self._timers[index].record(delta)
        self._unfinished -= delta.finished
        return index, delta

    @overload
    async def collect(self) -> list[Output[TokenLogprob]]: ...

    @overload
    async def collect(self, item: Callable[[TokenLogprob], LogprobT]) -> list[Output[LogprobT]]: ...

    async def collect(
        self, item: Callable[[TokenLogprob], object] = lambda token: token
    ) -> list[Output[Any]]:
        """Wait for all sequences. Raises: as iteration.

        `item` makes what is kept of a token's log-probabilities, as soon as it is there: a million
        of them take less room in JSON than as objects, and less time than all at the end.
        """
        outputs: list[Output[Any]] = [Output() for _ in self._timers]
        texts: list[list[str]] = [[] for _ in outputs]
        async for index, delta in self:
            output = outputs[index]
            texts[index].append(delta.text)
            output.token_ids += delta.token_ids
            if delta.logprobs is not None:
                output.logprobs = [] if output.logprobs is None else output.logprobs
                output.logprobs += map(item, delta.logprobs)
            output.finish_reason = delta.finish_reason or output.finish_reason
        for output, parts in zip(outputs, texts, strict=True):
            output.text = "".join(parts)
        return outputs

    async def aclose(self) -> None:
        """Abort what still runs."""
        await self._stream.aclose()
        for timer in self._timers:
            timer.report()


class _SequenceTimer:
    """The times of a sequence's tokens, for the metrics."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._first: float | None = None
        self._last = 0.0
        self._finish_reason: FinishReason | None = None
        self.tokens = 0

    def record(self, delta: TextDelta) -> None:
        """Count a delta that arrives now."""
        if delta.token_ids:
            self._last = asyncio.get_running_loop().time()
            self.tokens += len(delta.token_ids)
            if self._first is None:
                self._first = self._last
        self._finish_reason = delta.finish_reason

    def report(self) -> None:
        """Update the metrics; the sequence has ended."""
        route = self._context.route
        metrics.SEQUENCES.labels(route, self._finish_reason or "aborted").inc()
        if self._first is None:
            return
        metrics.GENERATED_TOKENS.labels(route).inc(self.tokens)
        metrics.FIRST_TOKEN.labels(route).observe(self._first - self._context.arrived)
        if self.tokens > 1:
            mean = (self._last - self._first) / (self.tokens - 1)
            metrics.PER_TOKEN.labels(route).observe(mean)


def _nth(sampling: SamplingParams, index: int) -> SamplingParams:
    """The parameters of sequence `index` of a prompt, which differ in the seed."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=nth_seed(sampling.seed, index))
