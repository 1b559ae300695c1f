"""What errors look like on the wire, to clients of different APIs.

Every route but TorchServe's has the shape of the OpenAI API: `{"error": {"message": ..., "type":
..., "param": ..., "code": ...}}`, where `param` names the field at fault or is null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

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
    TriptychError,
    Unauthorized,
)


class Kind(NamedTuple):
    """How a class of errors looks to a client."""

    status: int
    type: str
    code: str | None = None


class Shape(NamedTuple):
    """How an API tells errors."""

    kinds: Mapping[type[TriptychError], Kind]
    internal: Kind
    """What nobody raises on purpose."""
    unknown: Kind
    """A path that does not exist."""
    not_allowed: Kind
    """A method that a path does not take."""
    body: Callable[[str, Kind, str | None], str]
    """Message, kind and the field at fault as JSON."""


def _openai(message: str, kind: Kind, param: str | None) -> str:
    error = {"message": message, "type": kind.type, "param": param, "code": kind.code}
    return json.dumps({"error": error})


OPENAI = Shape(
    kinds={
        InvalidRequest: Kind(400, "invalid_request_error"),
        ContentFiltered: Kind(400, "invalid_request_error", "content_policy_violation"),
        ContextLengthExceeded: Kind(400, "invalid_request_error", "context_length_exceeded"),
        Unauthorized: Kind(401, "authentication_error", "invalid_api_key"),
        ModelNotServed: Kind(404, "invalid_request_error", "model_not_found"),
        ModelVersionNotServed: Kind(404, "invalid_request_error", "model_not_found"),
        PayloadTooLarge: Kind(413, "invalid_request_error", "payload_too_large"),
        Overloaded: Kind(429, "rate_limit_error", "rate_limit_exceeded"),
        EngineFailure: Kind(500, "server_error", "engine_failure"),
        RunnerUnavailable: Kind(503, "service_unavailable_error", "model_not_ready"),
        DeadlineExceeded: Kind(504, "timeout_error", "deadline_exceeded"),
    },
    internal=Kind(500, "server_error", "internal_error"),
    unknown=Kind(404, "invalid_request_error", "unknown_url"),
    not_allowed=Kind(405, "invalid_request_error", "unknown_url"),
    body=_openai,
)


def _torchserve(message: str, kind: Kind, param: str | None) -> str:
    error = {"code": kind.status, "type": kind.type, "message": message}
    return json.dumps(error, indent=2) + "\n"


TORCHSERVE = Shape(
    kinds={
        InvalidRequest: Kind(400, "BadRequestException"),
        ContentFiltered: Kind(400, "BadRequestException"),
        ContextLengthExceeded: Kind(400, "BadRequestException"),
        Unauthorized: Kind(401, "InvalidKeyException"),
        ModelNotServed: Kind(404, "ModelNotFoundException"),
        ModelVersionNotServed: Kind(404, "ModelVersionNotFoundException"),
        PayloadTooLarge: Kind(413, "BadRequestException"),
        # There a full queue is a 503, which its clients come back after.
        Overloaded: Kind(503, "ServiceUnavailableException"),
        EngineFailure: Kind(500, "InternalServerException"),
        RunnerUnavailable: Kind(503, "ServiceUnavailableException"),
        DeadlineExceeded: Kind(504, "RequestTimeoutException"),
    },
    internal=Kind(500, "InternalServerException"),
    unknown=Kind(404, "ResourceNotFoundException"),
    not_allowed=Kind(405, "MethodNotAllowedException"),
    body=_torchserve,
)
"""`{"code": ..., "type": ..., "message": ...}`, with the names of its exceptions."""
