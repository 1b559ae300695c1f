"""From prompts to images: one or several per request, whole or step by step.

All image routes call this module, as all text routes call `text`. What a request starts is closed
with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from api.http import metrics
from api.http.context import RequestContext, current_request
from api.models.base import ServedModel
from api.models.streams import MergedStream, open_all
from runners.contracts.errors import InvalidRequest, RunnerUnavailable, TriptychError
from runners.contracts.images import (
    MAX_PIXELS,
    ImageEvent,
    ImageModelInfo,
    ImageRequest,
    ImageRunner,
    RawImage,
)


@dataclass(frozen=True, slots=True)
class ImageResult:
    """A finished image, and the seed that generates it again."""

    image: RawImage
    seed: int


class ImageModel(ServedModel[ImageRunner]):
    """An image model as the routes see it."""

    @property
    def info(self) -> ImageModelInfo | None:
        """What the ranks loaded; None before they were ready once."""
        return self.runner.info

    def admit(self, requests: Sequence[ImageRequest]) -> None:
        """Admit images that the current request generates later, if they can be generated now.

        `requests`: one for each image, which differ in the seed only. Raises: Overloaded,
        InvalidRequest, RunnerUnavailable.
        """
        health = self.runner.health()
        if self.info is None or not health.ready:
            raise RunnerUnavailable(f"model {self.name} is not ready: {health.detail}")
        self._check(requests, self.info)
        context = current_request()
        context.resources.enter_context(self.admission.admit(len(requests)))
        context.is_admitted = True

    async def generate(self, requests: Sequence[ImageRequest]) -> ImageGeneration:
        """Start to generate images.

        Raises: Overloaded, DeadlineExceeded, InvalidRequest and what `ImageRunner.submit` does.
        """
        if self.info is not None:
            self._check(requests, self.info)
        context = current_request()
        if not context.is_admitted:
            context.resources.enter_context(self.admission.admit(len(requests)))
        async with context.within_deadline():
            streams = await open_all([self.runner.submit(request) for request in requests])
        generation = ImageGeneration(context, requests, MergedStream(streams))
        context.resources.push_async_callback(generation.aclose)
        return generation

    def _check(self, requests: Sequence[ImageRequest], info: ImageModelInfo) -> None:
        """Check the size of each image, and of all together. Raises: InvalidRequest."""
        first = info.checked(requests[0])
        height, width = first.height or info.height, first.width or info.width
        if len(requests) * height * width > MAX_PIXELS:
            raise InvalidRequest(
                f"{len(requests)} images of {width}x{height} have more than {MAX_PIXELS} pixels, "
                "which all images of a request may have",
                field="height",
            )


class ImageGeneration:
    """The running images of one HTTP request; iterate it, or `collect` it, once."""

    def __init__(
        self,
        context: RequestContext,
        requests: Sequence[ImageRequest],
        stream: MergedStream[ImageEvent],
    ) -> None:
        self._context = context
        self._requests = requests
        self._stream = stream
        self._unfinished = len(requests)

    def __aiter__(self) -> AsyncIterator[tuple[int, ImageEvent]]:
        """Yield events, each with the index of its image, until all images are finished.

        Raises: RunnerUnavailable, DeadlineExceeded, ContentFiltered, EngineFailure.
        """
        return self

    async def __anext__(self) -> tuple[int, ImageEvent]:
        if not self._unfinished:
            raise StopAsyncIteration
        async with self._context.within_deadline():
            try:
                index, event = await self._stream.next()
            except TriptychError:
                self._finish("failed")
                raise
        if event.finished:
            self._finish("finished")
        else:
            metrics.DENOISING_STEPS.labels(self._context.route).inc()
        return index, event

    async def collect(self) -> list[ImageResult]:
        """Wait for all images. Raises: as iteration."""
        images = {i: event.image async for i, event in self if event.image is not None}
        return [ImageResult(images[i], self.seed_of(i)) for i in range(len(self._requests))]

    def seed_of(self, index: int) -> int:
        """The seed that generates an image again."""
        return self._requests[index].seed

    async def aclose(self) -> None:
        """Abort what still runs."""
        await self._stream.aclose()
        metrics.IMAGES.labels(self._context.route, "aborted").inc(self._unfinished)

    def _finish(self, outcome: str) -> None:
        self._unfinished -= 1
        metrics.IMAGES.labels(self._context.route, outcome).inc()
