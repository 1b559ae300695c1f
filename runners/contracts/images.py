"""Requests, results and the interface of text-to-image models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from runners.contracts.errors import InvalidRequest
from runners.contracts.runner import Runner

MAX_PIXELS = 8192 * 8192
"""Pixels of an image, at most: at three bytes each it fits a rank's message of 256 MiB."""


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One image to generate. `None` means the model's own default."""

    request_id: str
    prompt: str
    negative_prompt: str | None = None
    """What the image must not show; it takes effect only with guidance."""
    height: int | None = None
    """In pixels."""
    width: int | None = None
    """In pixels."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """How closely the image follows the prompt (classifier-free guidance, arXiv:2207.12598)."""
    scheduler: str | None = None
    """One of `ImageModelInfo.schedulers`."""
    seed: int = 0
    """Same seed, same request, same image: beside others, equal up to rounding (docs/api.md)."""
    previews: int = 0
    """How many previews to send, evenly spread over the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawImage:
    """Pixels of 3 bytes, red green blue, row by row from the top left."""

    width: int
    height: int
    data: bytes = field(repr=False)


class ImageEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One denoising step of an image, or, with `image`, the end of its request."""

    request_id: str
    step: int
    """Steps that are done."""
    steps: int
    """Steps in all; some schedulers take more than were requested."""
    preview: RawImage | None = None
    """The model's current estimate of the image."""
    image: RawImage | None = None
    """The finished image, on the last event only."""

    @property
    def finished(self) -> bool:
        """Whether it is the last event of its request."""
        return self.image is not None


class ImageModelInfo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the loaded pipeline is, as the rank reports it when ready."""

    architecture: str
    engine: str
    parameters: int
    dtype: str
    devices: list[str]
    height: int
    """Default height, in pixels."""
    width: int
    """Default width, in pixels."""
    num_inference_steps: int
    """Default number of denoising steps."""
    guidance_scale: float
    """Default guidance scale."""
    scheduler: str
    """Default scheduler; empty if the pipeline's own has no name in `schedulers`."""
    schedulers: list[str]
    """Schedulers that a request may name."""
    takes_negative_prompt: bool
    size_multiple: int
    """Height and width must be multiples of it."""
    max_side: int | None = None
    """Maximum height and maximum width, in pixels; None: only `max_pixels` bounds them."""
    max_pixels: int
    """Maximum of height times width."""
    max_inference_steps: int

    def checked(self, request: ImageRequest) -> ImageRequest:
        """The request with its size and steps filled in. Raises: InvalidRequest."""
        height = self.height if request.height is None else request.height
        width = self.width if request.width is None else request.width
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.size_multiple:
                raise InvalidRequest(
                    f"must be a multiple of {self.size_multiple} pixels", field=name
                )
            if self.max_side is not None and side > self.max_side:
                raise InvalidRequest(
                    f"must be at most {self.max_side} pixels: the model has no positions beyond",
                    field=name,
                )
        if height * width > self.max_pixels:
            raise InvalidRequest(
                f"height times width must be at most {self.max_pixels} pixels", field="height"
            )
        steps = request.num_inference_steps
        if steps is None:
            steps = self.num_inference_steps
        if not 1 <= steps <= self.max_inference_steps:
            raise InvalidRequest(
                f"must be from 1 to {self.max_inference_steps}", field="num_inference_steps"
            )
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            allowed = ", ".join(self.schedulers) or "none"
            raise InvalidRequest(
                f"must be one of those that fit this model: {allowed}", field="scheduler"
            )
        if request.negative_prompt and not self.takes_negative_prompt:
            raise InvalidRequest("this model takes none", field="negative_prompt")
        return msgspec.structs.replace(
            request, height=height, width=width, num_inference_steps=steps
        )


class ImageRunner(Runner[ImageRequest, ImageEvent], Protocol):
    """A text-to-image model, on any of the engines."""

    @property
    def info(self) -> ImageModelInfo | None:
        """What the ranks loaded; None before they were ready once."""
        ...
