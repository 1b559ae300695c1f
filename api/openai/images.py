"""`POST /v1/images/generations`."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from api.http import sse
from api.http.image_files import Format, as_file
from api.http.json_pieces import Base64, json_response
from api.http.schemas import MAX_SIDE, ImageCount, ImageFields, ModelName
from api.models.images import ImageGeneration, ImageModel
from api.openai.requests import Ignored, Unsupported, unsupported
from api.openai.respond import rename_fields
from runners.contracts.errors import InvalidRequest
from runners.contracts.images import ImageRequest, RawImage

PARTIAL: Final = "image_generation.partial_image"
COMPLETED: Final = "image_generation.completed"
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class ImageGenerationRequest(ImageFields):
    """Body of `POST /v1/images/generations`.

    The fields from `negative_prompt` to `seed` are not part of the OpenAI API.
    """

    model: ModelName | None = None
    """The model's name, as `/v1/models` lists it. Default: the model that is served."""
    n: ImageCount | None = None
    """Number of images. Default: 1."""
    size: Annotated[str, Field(max_length=16)] | None = None
    """Width x height in pixels, such as `512x512`. Default: `auto`, the model's own."""
    response_format: Annotated[Literal["b64_json"], Field()] | None = None
    """Images are part of the response; this server stores none that a URL could name."""
    output_format: Format | None = None
    """Format of the images' files. Default: png."""
    stream: bool | None = None
    """Send each step as a server-sent event, then the images."""
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    """With `stream`: number of unfinished images to send. Default: 0."""
    background: Annotated[None, unsupported("auto", "opaque")] = None
    output_compression: Annotated[None, unsupported(100)] = None
    quality: Ignored = None
    style: Ignored = None
    moderation: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    frame_count: Unsupported = None
    svg: Unsupported = None

    def requests(self) -> list[ImageRequest]:
        """One request for each image. Raises: InvalidRequest."""
        if self.partial_images and not self.stream:
            raise InvalidRequest("requires stream", field="partial_images")
        height, width = self._sides()
        return self.to_requests(
            1 if self.n is None else self.n,
            height=height,
            width=width,
            previews=0 if self.partial_images is None else self.partial_images,
        )

    def _sides(self) -> tuple[int | None, int | None]:
        """Height and width in pixels. Raises: InvalidRequest."""
        if self.size is None or self.size == "auto":
            return None, None
        match = _SIZE.fullmatch(self.size)
        if match is None:
            raise InvalidRequest(
                "must be width x height in pixels, such as 512x512, or auto", field="size"
            )
        height, width = int(match[2]), int(match[1])
        if max(height, width) > MAX_SIDE:
            raise InvalidRequest(f"must be at most {MAX_SIDE} pixels a side", field="size")
        return height, width


class ImageData(BaseModel):
    """One image."""

    b64_json: Base64
    seed: int
    """The seed that generates it again; not part of the OpenAI API."""


class ImagesResponse(BaseModel):
    """Response of `/v1/images/generations`."""

    created: int
    data: list[ImageData]
    output_format: Format
    size: str
    background: Literal["opaque"] = "opaque"


class StepEvent(BaseModel):
    """One denoising step; not part of the OpenAI API."""

    type: Literal["image_generation.progress"] = "image_generation.progress"
    index: int
    """Index of the image."""
    step: int
    steps: int


class ImageEvent(BaseModel):
    """An image, finished or not."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    index: int
    """Index of the image; not part of the OpenAI API."""
    b64_json: Base64
    created_at: int
    output_format: Format
    size: str
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    partial_image_index: int | None = None
    seed: int | None = None
    usage: None = None


async def create_images(model: ImageModel, body: ImageGenerationRequest) -> Response:
    """Generate images; returns the whole or a stream. Raises: errors before the first step."""
    model.require(body.model)
    requests = body.requests()
    with rename_fields({"height": "size", "width": "size"}):
        generation = await model.generate(requests)
    created, file_format = int(time.time()), body.output_format or "png"
    if body.stream:
        frames = _frames(generation, created, file_format)
        return await sse.stream_response(frames, error_event="error")
    results = await generation.collect()
    data = [
        ImageData(b64_json=await as_file(result.image, file_format), seed=result.seed)
        for result in results
    ]
    size = _size(results[0].image)
    response = ImagesResponse(created=created, data=data, output_format=file_format, size=size)
    return json_response(response)


async def _frames(
    generation: ImageGeneration, created: int, file_format: Format
) -> AsyncIterator[bytes]:
    partial_counts: dict[int, int] = {}
    async for index, event in generation:
        if event.image is None:
            step = StepEvent(index=index, step=event.step, steps=event.steps)
            yield sse.frame(step, event=step.type)
        if (image := event.image or event.preview) is not None:
            partial_count = partial_counts.get(index, 0)
            image_event = ImageEvent(
                type=COMPLETED if event.image else PARTIAL,
                partial_image_index=None if event.image else partial_count,
                index=index,
                b64_json=await as_file(image, file_format),
                created_at=created,
                output_format=file_format,
                size=_size(image),
                seed=generation.seed_of(index),
            )
            partial_counts[index] = partial_count + 1
            yield sse.frame(image_event, event=image_event.type)


def _size(image: RawImage) -> str:
    return f"{image.width}x{image.height}"
