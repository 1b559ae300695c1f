"""Images as files. They are encoded in a thread, because a large one would block the event loop."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Literal

from PIL import Image

from runners.contracts.images import RawImage

Format = Literal["png", "jpeg", "webp"]
_OPTIONS: dict[Format, dict[str, int]] = {
    "png": {"compress_level": 4},
    "jpeg": {"quality": 92, "subsampling": 0},
    "webp": {"quality": 92},
}


async def as_file(image: RawImage, file_format: Format) -> bytes:
    """The content of the image's file."""
    return await asyncio.to_thread(_encode, image, file_format)


async def as_nested_lists(image: RawImage) -> bytes:
    """The pixels as JSON of shape height x width x 3 (red, green, blue), each from 0 to 255."""
    return await asyncio.to_thread(_nested_lists, image)


def media_type(file_format: Format) -> str:
    """The file's Content-Type."""
    return f"image/{file_format}"


def _encode(image: RawImage, file_format: Format) -> bytes:
    pixels = Image.frombytes("RGB", (image.width, image.height), image.data)
    file = io.BytesIO()
    pixels.save(file, file_format, **_OPTIONS[file_format])
    return file.getvalue()


def _nested_lists(image: RawImage) -> bytes:
    length = 3 * image.width
    rows = []
    # Row by row: json.dumps of the whole image would keep the interpreter's lock throughout.
    for start in range(0, len(image.data), length):
        row = image.data[start : start + length]
        rows.append(json.dumps([list(row[i : i + 3]) for i in range(0, length, 3)]))
    return f"[{','.join(rows)}]".encode()
