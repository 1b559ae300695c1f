"""An image program in the test's own process, without a rank."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from runners.config.files import load_setup_config
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest
from runners.images.pipeline import load_pipeline
from runners.images.program import image_program
from runners.protocol.messages import Abort, Events, Failed, RankMessage, Submit
from runners.rank.program import RankContext
from tests.support.fake_device import FakeDevice
from tests.support.images import Pixels, pixels_of


class LocalImageProgram:
    """An image program, and all messages that it emitted.

    `on_cpu=False` keeps half precision, as on a GPU. `device` runs it on that, `prepare` is done to
    the pipeline before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        on_cpu: bool = True,
        device: FakeDevice | None = None,
        prepare: Callable[[Any], None] = lambda pipeline: None,
        **overrides: object,
    ) -> None:
        config: Any = load_setup_config(folder, name=folder.name, overrides=overrides)[0]
        self.messages: list[RankMessage] = []
        context = RankContext(
            config=config,
            rank=0,
            num_threads=1,
            work_dir=folder,
            emit=self.messages.append,
        )
        with warnings.catch_warnings(action="ignore"):  # of diffusers
            self.pipeline: Any = load_pipeline(config, on_cpu=on_cpu)
            self._device = device or contextlib.nullcontext()
            with self._device:
                prepare(self.pipeline)
                self._program = image_program(context, self.pipeline)

    @property
    def info(self) -> ImageModelInfo:
        """Facts about the loaded pipeline."""
        return self._program.info

    @property
    def events(self) -> list[ImageEvent]:
        """The events of all images."""
        messages = [message for message in self.messages if isinstance(message, Events)]
        return [e for message in messages for e in message.events if isinstance(e, ImageEvent)]

    def submit(self, *requests: ImageRequest) -> None:
        """Submit requests without running a step."""
        for request in requests:
            self._program.receive(Submit(request))

    def abort(self, request: ImageRequest) -> None:
        """Abort a request."""
        self._program.receive(Abort(request.request_id))

    def step(self) -> None:
        """Run one step of the program."""
        with self._device, torch.no_grad(), warnings.catch_warnings(action="ignore"):
            self._program.step()

    def result_of(self, request: ImageRequest) -> Pixels | Failed | None:
        """How a request ended; None if it has not."""
        for message in self.messages:
            if isinstance(message, Failed) and message.request_id == request.request_id:
                return message
        for event in self.events:
            if event.request_id == request.request_id and event.image is not None:
                return pixels_of(event.image)
        return None

    def results(self, *requests: ImageRequest) -> list[Pixels | Failed]:
        """How requests end that run together."""
        self.submit(*requests)
        while any(self.result_of(request) is None for request in requests):
            self.step()
        return [end for request in requests if (end := self.result_of(request)) is not None]

    def generate(self, *requests: ImageRequest) -> list[Pixels]:
        """The images of requests that run together, all of which must succeed."""
        images = []
        for result in self.results(*requests):
            assert not isinstance(result, Failed), result
            images.append(result)
        return images

    def failure(self, request: ImageRequest) -> Failed:
        """How a request fails, which it must."""
        [result] = self.results(request)
        assert isinstance(result, Failed)
        return result
