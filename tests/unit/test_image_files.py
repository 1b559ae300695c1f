"""Images as files."""

from __future__ import annotations

import io
from typing import get_args

import pytest
from PIL import Image

from api.http.image_files import Format, as_file
from api.http.schemas import MAX_SIDE
from runners.contracts.images import RawImage


@pytest.mark.parametrize("file_format", get_args(Format))
async def test_the_longest_side_fits_into_every_format(file_format: Format) -> None:
    image = RawImage(width=MAX_SIDE, height=8, data=bytes(MAX_SIDE * 8 * 3))
    assert Image.open(io.BytesIO(await as_file(image, file_format))).size == (MAX_SIDE, 8)
