"""An image program in the test's own process: what a rank runs, without the rank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from runners.config.files import load_setup_config
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest
from runners.images.pipeline import load_pipeline
from runners.images.program import image_program
from runners.protocol.messages import Abort, Events, Failed, RankMessage, Submit
from runners.rank.program import RankContext
from tests.support.painting import Pixels, pixels_of


class Easels:
    """A program, and all that it told."""

    def __init__(self, folder: Path, **overrides: object) -> None:
        config: Any = load_setup_config(folder, name=folder.name, overrides=overrides)[0]
        self.messages: list[RankMessage] = []
        context = RankContext(
            config=config,
            rank=0,
            num_threads=1,
            work_dir=folder,
            emit=self.messages.append,
        )
        with warnings.catch_warnings(action="ignore"):  # of diffusers' own
            self.pipeline: Any = load_pipeline(config, on_cpu=True)
            self._program = image_program(context, self.pipeline)

    @property
    def info(self) -> ImageModelInfo:
        """What was loaded."""
        return self._program.info

    @property
    def events(self) -> list[ImageEvent]:
        """Of all pictures."""
        told = [message for message in self.messages if isinstance(message, Events)]
        return [e for message in told for e in message.events if isinstance(e, ImageEvent)]

    def submit(self, *requests: ImageRequest) -> None:
        """Hand requests over, which nobody paints yet."""
        for request in requests:
            self._program.receive(Submit(request))

    def abort(self, request: ImageRequest) -> None:
        """Give a request up."""
        self._program.receive(Abort(request.request_id))

    def step(self) -> None:
        """One step of the program."""
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            self._program.step()

    def end_of(self, request: ImageRequest) -> Pixels | Failed | None:
        """How a picture ended; None if it did not."""
        for message in self.messages:
            if isinstance(message, Failed) and message.request_id == request.request_id:
                return message
        for event in self.events:
            if event.request_id == request.request_id and event.image is not None:
                return pixels_of(event.image)
        return None

    def outcomes(self, *requests: ImageRequest) -> list[Pixels | Failed]:
        """How pictures end that are painted together."""
        self.submit(*requests)
        while any(self.end_of(request) is None for request in requests):
            self.step()
        return [end for request in requests if (end := self.end_of(request)) is not None]

    def paint(self, *requests: ImageRequest) -> list[Pixels]:
        """Pictures that are painted together, all of which must come about."""
        pictures = []
        for end in self.outcomes(*requests):
            assert not isinstance(end, Failed), end
            pictures.append(end)
        return pictures

    def failure(self, request: ImageRequest) -> Failed:
        """How a picture fails, which it must."""
        [end] = self.outcomes(request)
        assert isinstance(end, Failed)
        return end
