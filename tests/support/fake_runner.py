"""Runners without ranks, for tests of what is above the runners."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Generic, Self, TypeVar

from typing_extensions import override

from runners.contracts.errors import ContextLengthExceeded, InvalidRequest, RunnerUnavailable
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest, RawImage
from runners.contracts.runner import Event, RunnerHealth, RunnerState
from runners.contracts.tasks import Finding, TaskRequest, TaskResult
from runners.contracts.text import (
    ChatPrompt,
    GenerationRequest,
    ModelInfo,
    Prompt,
    TextDelta,
    TokenLogprob,
)

VOCAB_SIZE = 256
EventT = TypeVar("EventT", bound=Event)


class FakeTextRunner:
    """Generates tokens that prompt and seed determine, one for each turn of the event loop."""

    name = "fake"
    version = "1"
    task = "text-generation"
    max_concurrency = 8

    def __init__(self) -> None:
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
        _check_vocabulary(ids)
        return ids

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of UTF-8 bytes."""
        _check_vocabulary(token_ids)
        return bytes(token_ids).decode(errors="replace")


def _check_vocabulary(token_ids: list[int]) -> None:
    if any(token >= VOCAB_SIZE for token in token_ids):
        raise InvalidRequest("a token id is outside the vocabulary")


class FakeStream:
    """The deltas of one request."""

    def __init__(
        self, runner: FakeTextRunner, request: GenerationRequest, prompt_ids: list[int]
    ) -> None:
        self.request_id = request.request_id
        self.prompt_tokens = len(prompt_ids)
        self._runner = runner
        self._deltas = self._generate(request, prompt_ids)

    async def _generate(
        self, request: GenerationRequest, prompt_ids: list[int]
    ) -> AsyncIterator[TextDelta]:
        sampling = request.sampling
        rng = random.Random(f"{prompt_ids} {sampling.seed}")
        count = sampling.max_new_tokens or 16
        for i in range(count):
            await asyncio.sleep(0)
            if self._runner.lost:
                raise RunnerUnavailable("a rank was lost")
            token = rng.randrange(32, 127)
            yield TextDelta(
                request_id=self.request_id,
                text=chr(token),
                token_ids=[token],
                logprobs=None if sampling.logprobs is None else [_logprob(token)],
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


def _logprob(token: int) -> TokenLogprob:
    top = TokenLogprob(token_id=token, token=chr(token), token_bytes=bytes([token]), logprob=-0.5)
    return replace(top, top=[top])


class FakeChatRunner(FakeTextRunner):
    """It has a chat template, the contents of the turns, one per line, and its context ends."""

    @override
    async def submit(self, request: GenerationRequest) -> FakeStream:
        if (request.sampling.max_new_tokens or 0) > 64:
            raise ContextLengthExceeded("must be at most 64", field="max_new_tokens")
        return await super().submit(request)

    @override
    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            prompt = "\n".join(message.content for message in prompt.messages)
        return await super().tokenize(prompt, add_special_tokens=add_special_tokens)


class _OneModel:
    """What the fakes below have in common: always ready, with nothing to start."""

    version = "1"
    max_concurrency = 8

    def __init__(self) -> None:
        self.devices = ["cpu"]

    def health(self) -> RunnerHealth:
        return RunnerHealth(state=RunnerState.READY, detail="fake")

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class FakeImageRunner(_OneModel):
    """Images of one colour, which the seed determines, in one step."""

    name = "fake-image"
    task = "text-to-image"

    def __init__(self) -> None:
        super().__init__()
        self.info = ImageModelInfo(
            architecture="Fake",
            engine="fake",
            parameters=0,
            dtype="float32",
            devices=["cpu"],
            height=8,
            width=8,
            num_inference_steps=1,
            guidance_scale=1.0,
            scheduler="ddim",
            schedulers=["ddim"],
            takes_negative_prompt=True,
            size_multiple=8,
            max_pixels=64 * 64,
            max_inference_steps=1000,
        )

    async def submit(self, request: ImageRequest) -> FakeEvents[ImageEvent]:
        checked = self.info.checked(request)
        assert checked.width is not None
        assert checked.height is not None
        width, height = checked.width, checked.height
        image = RawImage(
            width=width, height=height, data=bytes([request.seed % 256]) * (3 * width * height)
        )
        events = [
            ImageEvent(request_id=request.request_id, step=1, steps=1),
            ImageEvent(request_id=request.request_id, step=1, steps=1, image=image),
        ]
        return FakeEvents(request.request_id, events)


class FakeTaskRunner(_OneModel):
    """One finding for each input."""

    name = "fake-task"

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task
        self.info: ModelInfo | None = None

    async def submit(self, request: TaskRequest) -> FakeEvents[TaskResult]:
        finding = Finding(score=0.5, label="A", text="a", token_id=1, start=0, end=1)
        result = TaskResult(request_id=request.request_id, findings=[finding])
        return FakeEvents(request.request_id, [result])


class FakeEvents(Generic[EventT]):
    """Events that are there from the start."""

    prompt_tokens = 0

    def __init__(self, request_id: str, events: list[EventT]) -> None:
        self.request_id = request_id
        self._events = events

    async def __aiter__(self) -> AsyncIterator[EventT]:
        for event in self._events:
            await asyncio.sleep(0)
            yield event

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None: ...
