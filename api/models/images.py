"""From prompts to pictures: one or several of one request, whole or step by step.

As `generation` for text: all routes come through here, and what a request starts is closed with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from random import SystemRandom

import msgspec

from api.http import metrics
from api.http.context import RequestContext, current_request
from api.models.base import HeldModel
from api.models.streams import MergedStream, open_all, truncated
from runners.contracts.errors import RunnerUnavailable, TriptychError
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest, ImageRunner, RawImage

_picture_numbers = count(1)
_random = SystemRandom()


@dataclass(frozen=True, slots=True)
class Painted:
    """A finished picture, and the seed that makes it again."""

    picture: RawImage
    seed: int


class ImageModel(HeldModel[ImageRunner]):
    """An image model as the routes see it."""

    @property
    def info(self) -> ImageModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        return self.runner.info

    def check(self, wish: ImageRequest, *, n: int) -> None:
        """Whether `n` pictures would be painted, as far as can be told before.

        Raises: Overloaded, InvalidRequest, RunnerUnavailable.
        """
        health = self.runner.health()
        if self.info is None or not health.ready:
            raise RunnerUnavailable(f"model {self.name} is not ready: {health.detail}")
        self.info.checked(wish)
        with self.admission.admit(n):
            pass

    async def paint(self, wish: ImageRequest, *, seed: int | None, n: int = 1) -> Painting:
        """Start `n` pictures; picture i has the seed `seed` + i, one of ours without.

        Raises: Overloaded, DeadlineExceeded and what `ImageRunner.submit` does.
        """
        request = current_request()
        request.resources.enter_context(self.admission.admit(n))
        first = _random.getrandbits(31) if seed is None else seed
        wishes = [
            msgspec.structs.replace(
                wish,
                request_id=f"{request.request_id}-{next(_picture_numbers)}",
                seed=(first + i) % 2**63,
            )
            for i in range(n)
        ]
        async with request.within_deadline():
            streams = await open_all([self.runner.submit(each) for each in wishes])
        painting = Painting(request, wishes, MergedStream(streams))
        request.resources.push_async_callback(painting.aclose)
        return painting


class Painting:
    """The pictures of one request in the making; iterate it, or `collect` it, once."""

    def __init__(
        self,
        request: RequestContext,
        wishes: list[ImageRequest],
        arrivals: MergedStream[ImageEvent],
    ) -> None:
        self._request = request
        self._wishes = wishes
        self._arrivals = arrivals
        self._unfinished = len(wishes)

    async def __aiter__(self) -> AsyncIterator[tuple[int, ImageEvent]]:
        """Yield what happens, with the index of its picture, until all are finished.

        Raises: RunnerUnavailable, DeadlineExceeded, ContentFiltered, EngineFailure.
        """
        arrivals = aiter(self._arrivals)
        while self._unfinished:
            async with self._request.within_deadline():
                arrival = await self._next(arrivals)
            finished = arrival[1].finished
            self._unfinished -= finished
            if finished:
                metrics.PICTURES.labels(self._request.route, "finished").inc()
            else:
                metrics.DENOISING_STEPS.labels(self._request.route).inc()
            yield arrival

    async def _next(
        self, arrivals: AsyncIterator[tuple[int, ImageEvent]]
    ) -> tuple[int, ImageEvent]:
        try:
            arrival = await anext(arrivals, None)
            if arrival is None:
                raise truncated()
            return arrival
        except TriptychError:
            self._unfinished -= 1
            metrics.PICTURES.labels(self._request.route, "failed").inc()
            raise

    async def collect(self) -> list[Painted]:
        """Wait for all pictures. Raises: as iteration."""
        pictures = {i: event.image async for i, event in self if event.image is not None}
        return [Painted(pictures[i], self.seed_of(i)) for i in range(len(self._wishes))]

    def seed_of(self, index: int) -> int:
        """What makes a picture again."""
        return self._wishes[index].seed

    async def aclose(self) -> None:
        """Abort what still runs."""
        await self._arrivals.aclose()
        metrics.PICTURES.labels(self._request.route, "aborted").inc(self._unfinished)
