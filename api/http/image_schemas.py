"""What request bodies of all image routes have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from api.http.schemas import WireModel
from runners.contracts.images import ImageRequest

MAX_IMAGES = 10
"""Pictures one request may ask for."""
MAX_SIDE = 16_383
"""In pixels, which is where WebP ends."""
MAX_STEPS = 1000

Side = Annotated[int, Field(ge=8, le=MAX_SIDE)]
ImagePrompt = Annotated[str, Field(min_length=1, max_length=32_000)]
ImageCount = Annotated[int, Field(ge=1, le=MAX_IMAGES)]


class PaintingFields(WireModel):
    """How a picture is painted; null means as the model itself has it."""

    prompt: ImagePrompt
    """What the picture shows."""
    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    """What it does not show."""
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """How closely the picture follows the prompt; up to 1 nothing is done to guide it."""
    scheduler: Annotated[str, Field(max_length=64)] | None = None
    """The sampler, such as `ddim`, `euler` or `dpm++_2m`; an error lists those that fit."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Same seed, same request, same pixels; picture i of several has `seed + i`."""

    def wish(self, height: int | None, width: int | None, *, previews: int = 0) -> ImageRequest:
        """The request for one picture; its id and its seed come later."""
        return ImageRequest(
            request_id="",
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            height=height,
            width=width,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            previews=previews,
        )
