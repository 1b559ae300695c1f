"""Bentos and models of the fake BentoCloud, validated with BentoML's schemas."""

from __future__ import annotations

import io
import tarfile
import uuid
from datetime import UTC, datetime
from typing import Any

import attr
import yaml
from bentoml._internal.cloud.schemas import schemasv1, schemasv2
from bentoml._internal.cloud.schemas.utils import schema_from_object
from starlette.requests import Request


class Refused(Exception):
    """A request that BentoCloud would refuse, with the status of its response."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


USER = {"name": "test", "email": "test@localhost", "first_name": "", "last_name": ""}


def resource(name: str, kind: str, **values: Any) -> dict[str, Any]:
    """A `ResourceSchema` with more fields."""
    now = datetime.now(UTC).isoformat()
    stamps = {"created_at": now, "updated_at": now, "deleted_at": None}
    common = {"uid": uuid.uuid4().hex, "name": name, "resource_type": kind, "labels": []}
    return common | stamps | values


CLUSTER = resource(
    "default", "cluster", description="", organization_name="test", creator=USER, is_first=True
)


def envelope(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A list as BentoCloud answers it."""
    if not items:
        raise Refused("record not found", 404)
    return {"start": 0, "count": len(items), "total": len(items), "items": items}


async def read(request: Request, schema: str) -> dict[str, Any]:
    """The JSON of a request that fits one of BentoML's schemas. Raises: Refused."""
    versions = (schemasv2, schemasv1)
    cls = next(getattr(module, schema) for module in versions if hasattr(module, schema))
    try:
        body: dict[str, Any] = await request.json()
        if unknown := body.keys() - {field.name for field in attr.fields(cls)}:
            raise Refused(f"{schema} has no {', '.join(sorted(unknown))}")
        schema_from_object(body, cls)
    except (ValueError, TypeError, KeyError, AttributeError, ExceptionGroup) as error:
        raise Refused(f"not a {schema}: {error}") from None
    return body


class Item:
    """A bento or a model, and the state of its upload."""

    def __init__(self, kind: str, name: str, wanted: dict[str, Any], transport: str) -> None:
        self.kind, self.name, self.wanted = kind, name, wanted
        self.status, self.reason = "pending", ""
        self.upload_id: str | None = None
        self.archive: bytes | None = None
        self.uploads = 0
        """Number of complete uploads."""
        # With None the client asks for a presigned URL. With presigned_url and no URL it uploads
        # in parts.
        self._strategy = {"proxy": "proxy", "multipart": "presigned_url"}.get(transport)

    def answer(self, **more: Any) -> dict[str, Any]:
        """A `BentoSchema` or `ModelSchema`."""
        blank = {"image_build_status": "pending", "presigned_download_url": ""}
        upload = {
            "upload_status": self.status,
            "upload_finished_reason": self.reason,
            "presigned_upload_url": "",
            "transmission_strategy": self._strategy,
            "upload_id": self.upload_id,
        }
        return resource(
            self.wanted["version"], self.kind, **{**blank, **upload, **self.wanted, **more}
        )

    def take(self, archive: bytes) -> None:
        """Accept a complete upload. Raises: Refused if its content is not as announced."""
        self.names = _checked(archive, self.kind, self.name, self.wanted["version"])
        self.archive, self.status = archive, "success"
        self.uploads += 1

    def finish(self, outcome: dict[str, Any]) -> None:
        """Record the outcome of an upload. Raises: Refused if nothing was uploaded."""
        if outcome["status"] == "success":
            if self.archive is None:
                raise Refused("nothing was uploaded")
            self.take(self.archive)
        self.status, self.reason = outcome["status"], outcome["reason"]


def _checked(archive: bytes, kind: str, name: str, version: str) -> list[str]:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            names = [member.name.removeprefix("./") for member in tar.getmembers()]
            file = tar.extractfile(f"./{kind}.yaml")
            assert file is not None
            info = yaml.safe_load(file)
    except (tarfile.TarError, KeyError, AssertionError, yaml.YAMLError) as error:
        raise Refused(f"not the archive of a {kind}: {error}") from None
    if (info["name"], info["version"]) != (name, version):
        raise Refused(f"the archive is that of {info['name']}:{info['version']}")
    if kind == "bento" and any(n.split("/")[0] == "models" for n in names):
        raise Refused("models are pushed next to a bento, not in it")
    return names
