"""What the HTTP layer, the channel and the engines tell each other about images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from runners.contracts import Runner


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

        Raises: RunnerUnavailable, EngineFailure.
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
    max_pixels: int
    """Most pixels of a picture, height times width."""
    max_inference_steps: int


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
