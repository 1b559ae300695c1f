"""Pictures as files, made in a thread: a large one takes longer than others should wait."""

from __future__ import annotations

import asyncio
import base64
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


async def as_file(picture: RawImage, kind: Format) -> bytes:
    """The picture as the content of a file."""
    return await asyncio.to_thread(_encode, picture, kind)


async def as_base64(picture: RawImage, kind: Format) -> str:
    """The file's content in base64."""
    return base64.b64encode(await as_file(picture, kind)).decode("ascii")


async def as_nested_lists(picture: RawImage) -> bytes:
    """The pixels as JSON: rows of pixels of red, green and blue, each from 0 to 255."""
    return await asyncio.to_thread(_nested, picture)


def media_type(kind: Format) -> str:
    """The file's Content-Type."""
    return f"image/{kind}"


def _encode(picture: RawImage, kind: Format) -> bytes:
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.data)
    file = io.BytesIO()
    image.save(file, kind, **_OPTIONS[kind])
    return file.getvalue()


def _nested(picture: RawImage) -> bytes:
    length = 3 * picture.width
    rows = []
    # Row by row: while all of it is written at once, no other thread runs.
    for start in range(0, len(picture.data), length):
        row = picture.data[start : start + length]
        rows.append(json.dumps([list(row[i : i + 3]) for i in range(0, length, 3)]))
    return f"[{','.join(rows)}]".encode()
