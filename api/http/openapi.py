"""What the OpenAPI document says of a route, and how that becomes the document.

Each route package lists its operations in `operations.py`; `api.document` joins the lists. FastAPI
and BentoML each derive a document of their own from their routes, but neither knows what the other
serves, nor what the middlewares answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from api.http.error_formats import OPENAI, ErrorFormat
from runners.contracts.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    PayloadTooLarge,
    RunnerUnavailable,
    SlowRequest,
    TriptychError,
    Unauthorized,
    UnsupportedMediaType,
)

JSON = "application/json"
_REFERENCE = "#/components/schemas/{model}"
_PARAMETER = re.compile(r"{(\w+)}")

Content = Mapping[str, Any]
"""Python types by media type; `bytes` for content that is no text."""

Errors = tuple[type[TriptychError], ...]
ANY_ROUTE: Errors = (Unauthorized, DeadlineExceeded)
"""What the middlewares may answer on any route."""
ANY_BODY: Errors = (
    InvalidRequest,
    SlowRequest,
    PayloadTooLarge,
    UnsupportedMediaType,
    Overloaded,
)
"""What they may answer as well on a route that takes POST or PUT."""
ANY_MODEL: Errors = (
    *ANY_BODY,
    ContextLengthExceeded,
    ModelNotServed,
    Overloaded,
    EngineFailure,
    RunnerUnavailable,
)
"""What a route that calls a model may answer."""
_RETRY = {"Retry-After": "Seconds to wait before another try."}
_HEADERS: dict[type[TriptychError], dict[str, str]] = {
    Unauthorized: {"WWW-Authenticate": "`Bearer`"},
    Overloaded: _RETRY,
    RunnerUnavailable: _RETRY,
}


class Answer(NamedTuple):
    """The answer with one status."""

    description: str
    content: Content
    headers: Mapping[str, str] = {}
    """Descriptions of headers that the answer may have, by name."""
    events: Any = None
    """If the content may be a stream: the type of the `data` of its events, which is JSON."""
    end: str | None = None
    """The `data` of a stream's last event, if that is not JSON."""


class Operation(NamedTuple):
    """One method of one path."""

    method: Literal["get", "post", "put"]
    path: str
    name: str
    """Its `operationId`: unique, and the name of the method in generated clients."""
    description: str
    answers: Mapping[int, Answer]
    """By status."""
    body: Mapping[str, Any] = {}
    """Python types by media type."""
    query: Mapping[str, str] = {}
    """Descriptions of its query parameters, all required."""


def ok(
    content: Content,
    *,
    events: Any = None,
    end: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[int, Answer]:
    """The answer to a request that succeeds. An error may be one of its events."""
    if events is not None:
        events = events | OPENAI.model
    return {200: Answer("Success.", content, headers or {}, events, end)}


def errors(*classes: type[TriptychError], error_format: ErrorFormat = OPENAI) -> dict[int, Answer]:
    """The answers to errors: to those of any route, to `classes`, and to unexpected ones."""
    meanings: dict[int, list[str]] = {}
    headers: dict[int, dict[str, str]] = {}
    for cls in dict.fromkeys((*classes, *ANY_ROUTE)):
        status, type_, code = error_format.statuses[cls]
        meaning = (cls.__doc__ or "").partition("\n")[0]
        meanings.setdefault(status, []).append(f"`{code or type_}`: {meaning}")
        headers.setdefault(status, {}).update(_HEADERS.get(cls, {}))
    internal = error_format.internal
    unexpected = f"`{internal.code or internal.type}`: An unexpected error; the log has it."
    meanings.setdefault(internal.status, []).append(unexpected)
    return {
        status: Answer("\n\n".join(texts), {JSON: error_format.model}, headers.get(status, {}))
        for status, texts in sorted(meanings.items())
    }


def document(operations: Sequence[Operation], *, description: str) -> bytes:
    """The OpenAPI 3.1 document of `operations`, as JSON."""
    schemas, definitions = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    bearer = {"type": "http", "scheme": "bearer"}
    header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": "0.1.0", "description": description},
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {
            "schemas": definitions,
            "headers": {
                "RequestID": {
                    "description": "The request's id, also in the server's log.",
                    "schema": {"type": "string"},
                }
            },
            "securitySchemes": {"bearer": bearer, "key": header},
        },
        # Either of the two, if the server has a key.
        "security": [{}, {"bearer": []}, {"key": []}],
    }
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()


Schemas = Mapping[tuple[Any, JsonSchemaMode], dict[str, Any]]
"""JSON schemas of types, as request bodies (validation) and in answers (serialization)."""


def _schemas(operations: Iterable[Operation]) -> tuple[Schemas, dict[str, Any]]:
    """The schema of each type, and the definitions that they refer to."""
    types: dict[tuple[Any, JsonSchemaMode], None] = {}
    for operation in operations:
        types |= {(each, "validation"): None for each in operation.body.values()}
        for answer in operation.answers.values():
            in_answer = [*answer.content.values(), answer.events]
            types |= {(each, "serialization"): None for each in in_answer}
    inputs = [(each, mode, TypeAdapter(each)) for each, mode in types if each is not bytes]
    schemas, rest = TypeAdapter.json_schemas(inputs, ref_template=_REFERENCE)
    return schemas, rest["$defs"]


def _operation(operation: Operation, schemas: Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.name.replace("_", " ").capitalize(),
        "description": operation.description,
        "responses": {
            str(status): _response(answer, schemas) for status, answer in operation.answers.items()
        },
    }
    text = {"type": "string"}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": text | {"minLength": 1}}
        for name in _PARAMETER.findall(operation.path)
    ] + [
        {"name": name, "in": "query", "required": True, "description": meaning, "schema": text}
        for name, meaning in operation.query.items()
    ]
    if parameters:
        described["parameters"] = parameters
    if operation.body:
        content = _content(operation.body, "validation", schemas)
        described["requestBody"] = {"required": True, "content": content}
    return described


def _response(answer: Answer, schemas: Schemas) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-ID": {"$ref": "#/components/headers/RequestID"}}
    for name, meaning in answer.headers.items():
        headers[name] = {"description": meaning, "schema": {"type": "string"}}
    content = _content(answer.content, "serialization", schemas)
    if answer.events is not None:
        # OpenAPI names the schema of an event from version 3.2 on; in 3.1, tools expect it here.
        event = _event(schemas[answer.events, "serialization"], answer.end)
        content["text/event-stream"] = {"schema": event}
    return {"description": answer.description, "headers": headers, "content": content}


def _event(data: dict[str, Any], end: str | None) -> dict[str, Any]:
    """The schema of a server-sent event."""
    text: dict[str, Any] = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": data,
    }
    return {
        "type": "object",
        "description": "One event of the stream.",
        "properties": {
            "data": text if end is None else {"anyOf": [{"const": end}, text]},
            "event": {"type": "string"},
        },
        "required": ["data"],
    }


def _content(content: Content, mode: JsonSchemaMode, schemas: Schemas) -> dict[str, Any]:
    return {
        media_type: {} if each is bytes else {"schema": schemas[each, mode]}
        for media_type, each in content.items()
    }
