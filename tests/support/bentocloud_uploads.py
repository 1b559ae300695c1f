"""The object store of the fake BentoCloud: presigned URLs for whole files or parts, as in S3."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tests.support.bentocloud_items import Item, Refused

SMALLEST_PART = 5 * 2**20
"""S3's limit; the last part may be smaller."""


@dataclass
class _Parts:
    item: Item
    files: dict[int, Path] = field(default_factory=dict)
    etags: dict[int, str] = field(default_factory=dict)


class Blobs:
    """Uploads to presigned URLs, which take one object each and no token."""

    def __init__(self, folder: Path, url: Callable[[], str]) -> None:
        self._folder, self._url = folder, url
        self._presigned: dict[str, tuple[Item, _Parts | None, int]] = {}
        self._uploads: dict[str, _Parts] = {}

    def presign(self, item: Item) -> str:
        """The URL for a whole item."""
        return self._sign(item, None, 0)

    def start(self, item: Item) -> str:
        """Begin an upload in parts. Returns its id."""
        upload_id = secrets.token_hex(8)
        self._uploads[upload_id] = _Parts(item)
        return upload_id

    def presign_part(self, item: Item, upload_id: str, number: int) -> str:
        """The URL for a part, counted from 1. Raises: Refused."""
        if not 1 <= number <= 10_000:
            raise Refused("part_number must be from 1 to 10000")
        return self._sign(item, self._parts(item, upload_id), number)

    def complete(self, item: Item, upload_id: str, listed: list[dict[str, Any]]) -> None:
        """Join the parts. Raises: Refused."""
        parts = self._parts(item, upload_id)
        numbers = [part["part_number"] for part in listed]
        if numbers != list(range(1, len(parts.files) + 1)):
            raise Refused(f"parts {sorted(parts.files)} were uploaded, not {numbers}")
        if any(parts.etags[part["part_number"]] != part["etag"] for part in listed):
            raise Refused("an ETag is not that of its part")
        if any(parts.files[n].stat().st_size < SMALLEST_PART for n in numbers[:-1]):
            raise Refused("a part but the last is smaller than 5 MiB")
        item.archive = b"".join(parts.files[n].read_bytes() for n in numbers)
        del self._uploads[upload_id]

    async def put(self, request: Request) -> Response:
        """PUT of an object."""
        signed = self._presigned.get(request.path_params["secret"])
        if signed is None:
            return Response("SignatureDoesNotMatch", 403)
        if "x-yatai-api-token" in request.headers:
            return Response("the token of BentoCloud is not for the object store", 400)
        item, parts, number = signed
        if item.status != "uploading":
            return Response("the upload was not started", 409)
        path, digest = self._folder / secrets.token_hex(8), hashlib.md5()
        with path.open("wb") as file:
            async for chunk in request.stream():
                file.write(chunk)
                digest.update(chunk)
        if parts is None:
            item.archive = path.read_bytes()
        else:
            parts.files[number], parts.etags[number] = path, digest.hexdigest()
        return Response(headers={"ETag": digest.hexdigest()})

    def _sign(self, item: Item, parts: _Parts | None, number: int) -> str:
        secret = secrets.token_hex(16)
        self._presigned[secret] = (item, parts, number)
        return f"{self._url()}/blobs/{secret}"

    def _parts(self, item: Item, upload_id: str) -> _Parts:
        parts = self._uploads.get(upload_id)
        if parts is None or parts.item is not item:
            raise Refused(f"there is no upload {upload_id} of it")
        return parts
