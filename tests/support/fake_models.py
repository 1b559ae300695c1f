"""Fakes for the whole service: a chat model, an image model and models for tasks, without ranks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, Self, TypeVar

from typing_extensions import override

from runners.contracts.errors import ContextLengthExceeded, InvalidRequest
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest, RawImage
from runners.contracts.runner import Event, RunnerHealth, RunnerState
from runners.contracts.tasks import Finding, TaskRequest, TaskResult
from runners.contracts.text import ChatPrompt, GenerationRequest, ModelInfo, Prompt
from tests.support.fake_runner import VOCAB_SIZE, FakeStream, FakeTextRunner

EventT = TypeVar("EventT", bound=Event)


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

    @override
    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        if any(token >= VOCAB_SIZE for token in token_ids):
            raise InvalidRequest("a token id is outside the vocabulary", field="tokens")
        return await super().detokenize(token_ids, skip_special_tokens=skip_special_tokens)


IMAGE_INFO = ImageModelInfo(
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
"""What the ranks of a fake image model report."""


class _OneModel:
    """What the fakes below have in common: always ready, with nothing to start."""

    version = "1"
    step_timeout = 300.0
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
        self.info = IMAGE_INFO

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
    max_new_tokens = 0

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
