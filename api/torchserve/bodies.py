"""Bodies of `/predictions`: a text as it is, in a form, or in JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from api.http.schemas import read_json
from runners.contracts.errors import InvalidRequest

FORM_FIELDS = ("data", "body")
"""Where the example handlers look for the input, in this order."""
JSON_FIELDS = (*FORM_FIELDS, "inputs", "prompt")


class Input(NamedTuple):
    """What a client sent."""

    content: Any
    """A text; from JSON it may be anything."""
    options: dict[str, Any]
    """What stood beside it in a JSON object."""

    @property
    def text(self) -> str:
        """The content, if it is a text. Raises: InvalidRequest."""
        if not isinstance(self.content, str) or not self.content:
            raise InvalidRequest("the input must be a text that is not empty")
        return self.content


async def read_body(request: Request) -> Input:
    """The input of a request. Raises: InvalidRequest."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _from_json(await request.body())
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return Input(await _from_form(request), {})
    return Input(_decoded(await request.body()), {})


def _from_json(body: bytes) -> Input:
    value = read_json(body)
    if isinstance(value, str):
        return Input(value, {})
    allowed = ", ".join(JSON_FIELDS)
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a text, or an object with one of {allowed}")
    given = [value.pop(field) for field in JSON_FIELDS if field in value]
    given = [content for content in given if content is not None]
    if len(given) != 1:
        raise InvalidRequest(f"give the input as one of {allowed}, and as no more than one")
    return Input(given[0], value)


async def _from_form(request: Request) -> str:
    try:
        async with request.form(max_files=16, max_fields=64) as form:
            # Other fields mean nothing, as to those handlers.
            found = next((form[field] for field in FORM_FIELDS if field in form), None)
            content = await found.read() if isinstance(found, UploadFile) else found
    except HTTPException as error:
        raise InvalidRequest(f"the form can not be read: {error.detail}") from None
    if content is None:
        raise InvalidRequest(
            "the form has neither data nor body; with curl, send a file by -T input.txt, a text by "
            "--data-urlencode 'data=...'"
        )
    return content if isinstance(content, str) else _decoded(content)


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the input must be UTF-8") from None
