"""The formats of errors on the wire, one for each family of clients.

All routes except TorchServe's use that of the OpenAI API: `{"error": {"message": ..., "type": ...,
"param": ..., "code": ...}}`, where `param` names the field at fault or is null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pydantic import BaseModel

from runners.contracts.errors import (
    ContentFiltered,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    ModelNotServed,
    ModelVersionNotServed,
    Overloaded,
    PayloadTooLarge,
    RunnerUnavailable,
    SlowRequest,
    TriptychError,
    Unauthorized,
    UnsupportedMediaType,
)


class ErrorDetail(BaseModel):
    """The reason of an error."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class Error(BaseModel):
    """An error, on any route except TorchServe's."""

    error: ErrorDetail


class TorchServeError(BaseModel):
    """An error on TorchServe's routes."""

    code: int
    """The HTTP status."""
    type: str
    """The name of TorchServe's exception."""
    message: str


class ErrorStatus(NamedTuple):
    """What identifies a class of errors to a client."""

    status: int
    """The HTTP status."""
    type: str
    code: str | None = None


class ErrorFormat(NamedTuple):
    """How an API reports errors."""

    statuses: Mapping[type[TriptychError], ErrorStatus]
    internal: ErrorStatus
    """Unexpected errors."""
    unknown_path: ErrorStatus
    unknown_method: ErrorStatus
    """A method that a path does not take."""
    body: Callable[[str, ErrorStatus, str | None], str]
    """JSON of a message, its status and the field at fault."""
    model: type[BaseModel]
    """The type of that JSON."""


def _openai(message: str, status: ErrorStatus, param: str | None) -> str:
    error = {"message": message, "type": status.type, "param": param, "code": status.code}
    return json.dumps({"error": error})


OPENAI = ErrorFormat(
    statuses={
        InvalidRequest: ErrorStatus(400, "invalid_request_error"),
        ContentFiltered: ErrorStatus(400, "invalid_request_error", "content_policy_violation"),
        ContextLengthExceeded: ErrorStatus(400, "invalid_request_error", "context_length_exceeded"),
        Unauthorized: ErrorStatus(401, "authentication_error", "invalid_api_key"),
        ModelNotServed: ErrorStatus(404, "invalid_request_error", "model_not_found"),
        ModelVersionNotServed: ErrorStatus(404, "invalid_request_error", "model_not_found"),
        SlowRequest: ErrorStatus(408, "invalid_request_error", "request_timeout"),
        PayloadTooLarge: ErrorStatus(413, "invalid_request_error", "payload_too_large"),
        UnsupportedMediaType: ErrorStatus(415, "invalid_request_error", "unsupported_media_type"),
        Overloaded: ErrorStatus(429, "rate_limit_error", "rate_limit_exceeded"),
        EngineFailure: ErrorStatus(500, "server_error", "engine_failure"),
        RunnerUnavailable: ErrorStatus(503, "service_unavailable_error", "model_not_ready"),
        DeadlineExceeded: ErrorStatus(504, "timeout_error", "deadline_exceeded"),
    },
    internal=ErrorStatus(500, "server_error", "internal_error"),
    unknown_path=ErrorStatus(404, "invalid_request_error", "unknown_url"),
    unknown_method=ErrorStatus(405, "invalid_request_error", "unknown_url"),
    body=_openai,
    model=Error,
)


def _torchserve(message: str, status: ErrorStatus, param: str | None) -> str:
    error = {"code": status.status, "type": status.type, "message": message}
    return json.dumps(error, indent=2) + "\n"


TORCHSERVE = ErrorFormat(
    statuses={
        InvalidRequest: ErrorStatus(400, "BadRequestException"),
        ContentFiltered: ErrorStatus(400, "BadRequestException"),
        ContextLengthExceeded: ErrorStatus(400, "BadRequestException"),
        Unauthorized: ErrorStatus(401, "InvalidKeyException"),
        ModelNotServed: ErrorStatus(404, "ModelNotFoundException"),
        ModelVersionNotServed: ErrorStatus(404, "ModelVersionNotFoundException"),
        SlowRequest: ErrorStatus(408, "BadRequestException"),
        PayloadTooLarge: ErrorStatus(413, "BadRequestException"),
        UnsupportedMediaType: ErrorStatus(415, "BadRequestException"),
        # TorchServe answers 503 when its queue is full, and its clients retry after that.
        Overloaded: ErrorStatus(503, "ServiceUnavailableException"),
        EngineFailure: ErrorStatus(500, "InternalServerException"),
        RunnerUnavailable: ErrorStatus(503, "ServiceUnavailableException"),
        DeadlineExceeded: ErrorStatus(504, "RequestTimeoutException"),
    },
    internal=ErrorStatus(500, "InternalServerException"),
    unknown_path=ErrorStatus(404, "ResourceNotFoundException"),
    unknown_method=ErrorStatus(405, "MethodNotAllowedException"),
    body=_torchserve,
    model=TorchServeError,
)
"""`{"code": ..., "type": ..., "message": ...}`, where `type` is the name of its exception."""
