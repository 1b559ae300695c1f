"""The native image route: its body, its answers, and what it does."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import Response

from api.http.context import current_request
from api.http.image_files import Format, as_base64, as_file, media_type
from api.http.image_schemas import ImageCount, PaintingFields, Side
from api.models.images import ImageModel, Painted
from api.models.served import Served
from api.native.schemas import NativeAnswer, NativeBody
from runners.contracts.errors import InvalidRequest


class GenerateImageRequest(NativeBody, PaintingFields):
    """Paint what a prompt says."""

    height: Side | None = None
    """In pixels."""
    width: Side | None = None
    """In pixels."""
    num_images: ImageCount = 1
    """How many pictures."""
    format: Format = "png"
    """Of the picture's file."""
    response_format: Literal["image", "b64_json", "numpy"] | None = None
    """`image`: the file itself (default for one picture); `b64_json`: files in base64 (default for
    several); `numpy`: one array as its shape, dtype and bytes in base64."""

    @property
    def answer_kind(self) -> Literal["image", "b64_json", "numpy"]:
        """How to answer. Raises: InvalidRequest."""
        if self.response_format == "image" and self.num_images > 1:
            raise InvalidRequest(
                "image is for one image; use b64_json or numpy for several",
                field="response_format",
            )
        return self.response_format or ("image" if self.num_images == 1 else "b64_json")


class ImageFile(BaseModel):
    """One picture of several."""

    b64_json: str
    """The file's content in base64."""
    seed: int


class ImageArray(BaseModel):
    """Pictures as one array: `np.frombuffer(base64.b64decode(data), dtype).reshape(shape)`."""

    shape: tuple[int, int, int, int]
    """Pictures, height, width, 3 colours: red, green, blue."""
    dtype: Literal["uint8"] = "uint8"
    data: str
    """The bytes in base64, the last dimension running fastest."""


class GenerateImageResponse(NativeAnswer):
    """Pictures in JSON. A single one comes as its file instead, unless asked for otherwise."""

    request_id: str
    model: str
    seeds: list[int]
    images: list[ImageFile] | None = None
    """With `b64_json`."""
    array: ImageArray | None = None
    """With `numpy`."""


def check_image_request(served: Served, body: bytes) -> None:
    """Refuse a request before it becomes a task, whose answer comes much later.

    Raises: as `generate_image`, before anything is painted.
    """
    asked = GenerateImageRequest.parse(body)
    model = served.image
    model.require(asked.model)
    _ = asked.answer_kind
    model.check(asked.wish(asked.height, asked.width), n=asked.num_images)


async def generate_image(served: Served, body: GenerateImageRequest) -> Any:
    """Paint all pictures of a request, and answer with a file or with JSON."""
    model = served.image
    model.require(body.model)
    kind = body.answer_kind
    painting = await model.paint(
        body.wish(body.height, body.width), seed=body.seed, n=body.num_images
    )
    pictures = await painting.collect()
    if kind == "image":
        content = await as_file(pictures[0].picture, body.format)
        headers = {"X-Seed": str(pictures[0].seed)}
        return Response(content, headers=headers, media_type=media_type(body.format))
    return await _in_json(model, pictures, kind, body.format)


async def _in_json(
    model: ImageModel, pictures: Sequence[Painted], kind: str, file: Format
) -> GenerateImageResponse:
    images = array = None
    if kind == "numpy":
        array = _array(pictures)
    else:
        images = [
            ImageFile(b64_json=await as_base64(each.picture, file), seed=each.seed)
            for each in pictures
        ]
    return GenerateImageResponse(
        request_id=current_request().request_id,
        model=model.name,
        seeds=[each.seed for each in pictures],
        images=images,
        array=array,
    )


def _array(pictures: Sequence[Painted]) -> ImageArray:
    first = pictures[0].picture
    data = b"".join(each.picture.data for each in pictures)
    return ImageArray(
        shape=(len(pictures), first.height, first.width, 3),
        data=base64.b64encode(data).decode("ascii"),
    )
