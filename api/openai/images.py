"""`POST /v1/images/generations`."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from api.http import sse
from api.http.image_files import Format, as_base64
from api.http.image_schemas import MAX_SIDE, ImageCount, PaintingFields
from api.models.images import ImageModel, Painting
from api.openai.requests import Ignored, Unsupported, unsupported
from runners.contracts.errors import InvalidRequest
from runners.contracts.images import RawImage

PARTIAL: Final = "image_generation.partial_image"
COMPLETED: Final = "image_generation.completed"
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class ImageGenerationRequest(PaintingFields):
    """Body of `POST /v1/images/generations`; the fields from `negative_prompt` on are ours."""

    model: Annotated[str, Field(max_length=256)] | None = None
    """The model's name, as `/v1/models` lists it. Default: the one this server holds."""
    n: ImageCount | None = None
    """How many pictures. Default: 1."""
    size: Annotated[str, Field(max_length=16)] | None = None
    """Width x height in pixels, such as `512x512`; `auto`, the default, is the model's own."""
    response_format: Annotated[Literal["b64_json"], Field()] | None = None
    """Pictures come in the answer; this server keeps none to link to."""
    output_format: Format | None = None
    """Of the pictures' files. Default: png."""
    stream: bool | None = None
    """Send each step as a server-sent event, then the pictures."""
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    """With `stream`: how many unfinished pictures to send. Default: 0."""
    background: Annotated[None, unsupported("auto", "opaque")] = None
    output_compression: Annotated[None, unsupported(100)] = None
    quality: Ignored = None
    style: Ignored = None
    moderation: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    frame_count: Unsupported = None
    svg: Unsupported = None

    def check(self) -> None:
        """Rules over several fields. Raises: InvalidRequest."""
        if self.partial_images and not self.stream:
            raise InvalidRequest("needs stream", field="partial_images")

    def sides(self) -> tuple[int | None, int | None]:
        """Height and width. Raises: InvalidRequest."""
        if self.size in (None, "auto"):
            return None, None
        found = _SIZE.fullmatch(self.size or "")
        if found is None:
            raise InvalidRequest(
                "must be width x height in pixels, such as 512x512, or auto", field="size"
            )
        height, width = int(found[2]), int(found[1])
        if max(height, width) > MAX_SIDE:
            raise InvalidRequest(f"must be at most {MAX_SIDE} pixels a side", field="size")
        return height, width


class ImageData(BaseModel):
    """One picture."""

    b64_json: str
    seed: int
    """What makes it again; not part of the OpenAI API."""


class ImagesResponse(BaseModel):
    """Answer of `/v1/images/generations`."""

    created: int
    data: list[ImageData]
    output_format: Format
    size: str
    background: Literal["opaque"] = "opaque"


class StepEvent(BaseModel):
    """One denoising step; not part of the OpenAI API."""

    type: Literal["image_generation.progress"] = "image_generation.progress"
    index: int
    """Which of the pictures."""
    step: int
    steps: int


class PictureEvent(BaseModel):
    """A picture, finished or not."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    index: int
    """Which of the pictures; not part of the OpenAI API."""
    b64_json: str
    created_at: int
    output_format: Format
    size: str
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    partial_image_index: int | None = None
    seed: int | None = None
    usage: None = None


async def create_images(model: ImageModel, body: ImageGenerationRequest) -> Response:
    """Paint, and answer whole or as a stream. Raises: what happens before the first step."""
    model.require(body.model)
    body.check()
    height, width = body.sides()
    try:
        painting = await model.paint(
            body.wish(height, width, previews=body.partial_images or 0),
            seed=body.seed,
            n=body.n or 1,
        )
    except InvalidRequest as error:  # in the words of this client
        names = {"height": "size", "width": "size"}
        raise InvalidRequest(
            error.reason, field=names.get(error.field or "", error.field)
        ) from None
    created, file = int(time.time()), body.output_format or "png"
    if body.stream:
        frames = _frames(painting, created, file)
        return await sse.stream_response(sse.guarded(frames, error_event="error"))
    pictures = await painting.collect()
    data = [
        ImageData(b64_json=await as_base64(each.picture, file), seed=each.seed) for each in pictures
    ]
    size = _size(pictures[0].picture)
    answer = ImagesResponse(created=created, data=data, output_format=file, size=size)
    return Response(answer.model_dump_json(), media_type="application/json")


async def _frames(painting: Painting, created: int, file: Format) -> AsyncIterator[str]:
    shown: dict[int, int] = {}
    async for index, event in painting:
        if event.image is None:
            step = StepEvent(index=index, step=event.step, steps=event.steps)
            yield sse.frame(step.model_dump_json(), event=step.type)
        if (picture := event.image or event.preview) is not None:
            told = PictureEvent(
                type=COMPLETED if event.image else PARTIAL,
                partial_image_index=None if event.image else shown.get(index, 0),
                index=index,
                b64_json=await as_base64(picture, file),
                created_at=created,
                output_format=file,
                size=_size(picture),
                seed=painting.seed_of(index),
            )
            shown[index] = shown.get(index, 0) + 1
            yield sse.frame(told.model_dump_json(), event=told.type)


def _size(picture: RawImage) -> str:
    return f"{picture.width}x{picture.height}"
