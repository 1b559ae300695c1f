"""What the HTTP layer, the channel and the engines tell each other about images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from runners.contracts.errors import InvalidRequest
from runners.contracts.runner import Runner

MAX_PIXELS = 8192 * 8192
"""Of a picture: at three bytes each it fits into a message of a rank, which may have 256 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One picture to paint. `None` means the model's own default."""

    request_id: str
    prompt: str
    negative_prompt: str | None = None
    """What the picture shall not show; takes part only where there is guidance."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """How closely the picture follows the prompt (classifier-free guidance, arXiv:2207.12598)."""
    scheduler: str | None = None
    """One of `ImageModelInfo.schedulers`."""
    seed: int = 0
    """Same seed, same request, same pixels, whatever else is painted beside it."""
    previews: int = 0
    """How many unfinished pictures to show, evenly spread over the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Pixels of 3 bytes, red green blue, row by row from the top left."""

    width: int
    height: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEvent:
    """One denoising step of a picture, or, with `picture`, its end."""

    request_id: str
    step: int
    """How many steps are done."""
    steps: int
    """How many steps there are; some schedulers take more than were asked for."""
    preview: Picture | None = None
    """What the picture is going to look like, as far as the model can tell by now."""
    picture: Picture | None = None
    """The finished picture, on the last event only."""


class ImageStream(Protocol):
    """A picture being painted; `aclose` ends it."""

    def __aiter__(self) -> AsyncIterator[ImageEvent]:
        """Yield an event for each step; the last one carries the picture.

        Raises: RunnerUnavailable, PictureWithheld, EngineFailure.
        """
        ...

    async def aclose(self) -> None:
        """Abort if unfinished; the engine paints no step of it after the current one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageModelInfo:
    """What the loaded pipeline is, as the rank reports it when ready."""

    architecture: str
    engine: str
    parameters: int
    dtype: str
    devices: list[str]
    height: int
    """Of a picture whose request names none, in pixels."""
    width: int
    """As `height`."""
    num_inference_steps: int
    """Of a request that names none."""
    guidance_scale: float
    """Of a request that names none."""
    scheduler: str
    """Of a request that names none; empty if the pipeline's own is none of the named ones."""
    schedulers: list[str]
    """Those that a request may name."""
    takes_negative_prompt: bool
    size_multiple: int
    """What height and width must be multiples of."""
    max_side: int | None = None
    """Most pixels of its height, and of its width; None: as `max_pixels` allows."""
    max_pixels: int
    """Most pixels of a picture, height times width."""
    max_inference_steps: int

    def checked(self, request: ImageRequest) -> ImageRequest:
        """The request with its size and steps filled in. Raises: InvalidRequest."""
        height, width = request.height or self.height, request.width or self.width
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.size_multiple:
                raise InvalidRequest(
                    f"{name} must be a multiple of {self.size_multiple} pixels", param=name
                )
            if self.max_side is not None and side > self.max_side:
                raise InvalidRequest(
                    f"{name} may be {self.max_side} pixels at most: the model knows no positions "
                    "beyond",
                    param=name,
                )
        if height * width > self.max_pixels:
            raise InvalidRequest(
                f"height times width may be {self.max_pixels} pixels at most", param="height"
            )
        steps = request.num_inference_steps
        if steps is None:
            steps = self.num_inference_steps
        if not 1 <= steps <= self.max_inference_steps:
            raise InvalidRequest(
                f"num_inference_steps must be from 1 to {self.max_inference_steps}",
                param="num_inference_steps",
            )
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            allowed = ", ".join(self.schedulers) or "none to choose from"
            raise InvalidRequest(
                f"scheduler must be one of those that fit this model: {allowed}", param="scheduler"
            )
        if request.negative_prompt and not self.takes_negative_prompt:
            raise InvalidRequest("this model takes no negative_prompt", param="negative_prompt")
        return replace(request, height=height, width=width, num_inference_steps=steps)


class ImageRunner(Runner, Protocol):
    """A text-to-image model, held by one of the engines."""

    @property
    def info(self) -> ImageModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        ...

    async def paint(self, request: ImageRequest) -> ImageStream:
        """Hand a request to the engine and return once it was accepted.

        Raises: InvalidRequest (nothing was computed), RunnerUnavailable.
        """
        ...
