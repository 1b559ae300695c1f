"""RankedImageRunner: the async facade over a rank group that paints, one for all engines."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from runners.config.model import BaseRunnerConfig
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest
from runners.contracts.runner import RunnerHealth
from runners.host.client import RankedRunner, RankedStream
from runners.protocol.messages import Paint, Painted, RankMessage


class RankedImageRunner(RankedRunner[ImageEvent]):
    """A text-to-image model in a rank group; see `contracts.images.ImageRunner`.

    Every rank holds the whole model; a picture is painted by the one with the least to do.
    """

    def __init__(self, config: BaseRunnerConfig, *, program: str) -> None:
        super().__init__(config, program=program, is_last=lambda event: event.picture is not None)
        self._begun: set[str] = set()

    @property
    def info(self) -> ImageModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        info = self._group.info
        return info if isinstance(info, ImageModelInfo) else None

    def health(self) -> RunnerHealth:
        """The state right now, counted over all ranks."""
        running = len(self._begun)
        return replace(super().health(), running=running, waiting=len(self._streams) - running)

    async def paint(self, request: ImageRequest) -> RankedStream[ImageEvent]:
        """Hand a request to the engine and return once it was accepted."""
        load = Counter(self._ranks.values())
        rank = min(range(self._config.world_size), key=lambda rank: load[rank])
        return await self._submit(request.request_id, Paint(request), rank)

    def _on_message(self, message: RankMessage) -> None:
        match message:
            case Painted(events):
                for event in events:
                    if event.request_id in self._streams:
                        self._begun.add(event.request_id)
                    self._deliver(event.request_id, event)
            case _:
                super()._on_message(message)

    def _forget(self, request_id: str) -> RankedStream[ImageEvent] | None:
        self._begun.discard(request_id)
        return super()._forget(request_id)

    def _on_down(self, reason: str) -> None:
        self._begun.clear()
        super()._on_down(reason)
