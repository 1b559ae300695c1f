"""The native image route: its body, its responses and its handler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel
from starlette.responses import Response

from api.http.context import current_request
from api.http.image_files import Format, as_file, media_type
from api.http.json_pieces import Base64
from api.http.schemas import ImageCount, ImageFields, Side
from api.models.images import ImageModel, ImageResult
from api.models.served import ServedModels
from api.native.schemas import NativeBody, NativeResponse
from runners.contracts.errors import InvalidRequest
from runners.contracts.images import ImageRequest

ImageEncoding = Literal["image", "b64_json", "numpy"]


class GenerateImageRequest(NativeBody, ImageFields):
    """Generate images from a prompt."""

    height: Side | None = None
    """In pixels."""
    width: Side | None = None
    """In pixels."""
    num_images: ImageCount = 1
    """Number of images."""
    format: Format = "png"
    """Format of the images' files."""
    response_format: ImageEncoding | None = None
    """`image`: the file itself (default for one image); `b64_json`: files in base64 (default for
    several); `numpy`: one array as its shape, dtype and bytes in base64."""

    @property
    def encoding(self) -> ImageEncoding:
        """How images are returned. Raises: InvalidRequest."""
        if self.response_format == "image" and self.num_images > 1:
            raise InvalidRequest(
                "image is for one image; use b64_json or numpy for several",
                field="response_format",
            )
        return self.response_format or ("image" if self.num_images == 1 else "b64_json")

    def requests(self) -> list[ImageRequest]:
        """One request for each image."""
        return self.to_requests(self.num_images, height=self.height, width=self.width)


class ImageFile(BaseModel):
    """One of several images."""

    b64_json: Base64
    """The file's content in base64."""
    seed: int


class ImageArray(BaseModel):
    """Images as one array: `np.frombuffer(base64.b64decode(data), dtype).reshape(shape)`."""

    shape: tuple[int, int, int, int]
    """Images, height, width, and 3 colours: red, green, blue."""
    dtype: Literal["uint8"] = "uint8"
    data: Base64
    """The bytes in base64, in row-major order."""


class GenerateImageResponse(NativeResponse):
    """Images in JSON. A single image is returned as its file unless `response_format` is set."""

    request_id: str
    model: str
    seeds: list[int]
    images: list[ImageFile] | None = None
    """With `b64_json`."""
    array: ImageArray | None = None
    """With `numpy`."""


def admit_image_request(served: ServedModels, body: bytes) -> None:
    """Check and admit a job when it is submitted, because its result is read much later.

    Raises: as `generate_image`, but only what is known before an image is generated.
    """
    request = GenerateImageRequest.parse(body)
    model = served.image
    model.require(request.model)
    _ = request.encoding
    model.admit(request.requests())


async def generate_image(
    served: ServedModels, body: GenerateImageRequest
) -> GenerateImageResponse | Response:
    """Generate all images of a request; returns a file or JSON."""
    model = served.image
    model.require(body.model)
    encoding = body.encoding
    generation = await model.generate(body.requests())
    results = await generation.collect()
    if encoding == "image":
        content = await as_file(results[0].image, body.format)
        headers = {"X-Seed": str(results[0].seed)}
        return Response(content, headers=headers, media_type=media_type(body.format))
    return await _json_response(model, results, encoding, body.format)


async def _json_response(
    model: ImageModel, results: Sequence[ImageResult], encoding: ImageEncoding, file_format: Format
) -> GenerateImageResponse:
    images = array = None
    if encoding == "numpy":
        array = _array(results)
    else:
        images = [
            ImageFile(b64_json=await as_file(result.image, file_format), seed=result.seed)
            for result in results
        ]
    return GenerateImageResponse(
        request_id=current_request().request_id,
        model=model.name,
        seeds=[result.seed for result in results],
        images=images,
        array=array,
    )


def _array(results: Sequence[ImageResult]) -> ImageArray:
    first = results[0].image
    return ImageArray(
        shape=(len(results), first.height, first.width, 3),
        data=b"".join(result.image.data for result in results),
    )
