"""Bodies of `/predictions`: plain text, a form, or JSON."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from api.http.schemas import read_json
from runners.contracts.errors import InvalidRequest

FORM_FIELDS = ("data", "body")
"""Where TorchServe's example handlers look for the input, in this order."""
JSON_FIELDS = (*FORM_FIELDS, "inputs", "prompt")


class Input(NamedTuple):
    """The content of a body."""

    content: Any
    """A text; from JSON it may be anything. None for a JSON object without a field for it."""
    options: dict[str, Any]
    """The other fields of a JSON object."""

    @property
    def text(self) -> str:
        """The content, if it is a text. Raises: InvalidRequest."""
        if self.content is None:
            raise InvalidRequest(f"the body must have exactly one of {', '.join(JSON_FIELDS)}")
        if not isinstance(self.content, str) or not self.content:
            raise InvalidRequest("the input must be a text that is not empty")
        return self.content

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of an input that is an object: the body itself, its content, or its text.

        Raises: InvalidRequest.
        """
        content = {} if self.content is None else self.content
        with contextlib.suppress(InvalidRequest):
            content = read_json(content) if isinstance(content, str) else content
        if not isinstance(content, dict):
            raise InvalidRequest("the input must be a JSON object")
        return {**self.options, **content}


async def read_body(request: Request) -> Input:
    """The input of a request. Raises: InvalidRequest."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        return _from_json(await request.body())
    if content_type in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return Input(await _from_form(request), {})
    return Input(_decode(await request.body()), {})


def _from_json(body: bytes) -> Input:
    value = read_json(body)
    if isinstance(value, str):
        return Input(value, {})
    allowed = ", ".join(JSON_FIELDS)
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a text, or an object with one of {allowed}")
    contents = [value.pop(field) for field in JSON_FIELDS if field in value]
    contents = [content for content in contents if content is not None]
    if len(contents) > 1:
        raise InvalidRequest(f"the body must have exactly one of {allowed}")
    return Input(contents[0] if contents else None, value)


async def _from_form(request: Request) -> str:
    try:
        async with request.form(max_files=16, max_fields=64) as form:
            # Other fields are ignored, as TorchServe's handlers do.
            value = next((form[field] for field in FORM_FIELDS if field in form), None)
            content = await value.read() if isinstance(value, UploadFile) else value
    except HTTPException as error:
        raise InvalidRequest(f"the form cannot be read: {error.detail}") from None
    if content is None:
        raise InvalidRequest(
            "the form has neither data nor body; with curl, send a file by -T input.txt, a text by "
            "--data-urlencode 'data=...'"
        )
    return content if isinstance(content, str) else _decode(content)


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the input must be UTF-8") from None
