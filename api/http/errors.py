"""Errors as HTTP responses, in the format that the route's clients know (`error_formats`).

No message repeats the content of a body.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import ParamSpec

from pydantic import ValidationError
from starlette.responses import Response

from api.http.context import current_error_format, current_request
from api.http.error_formats import ErrorStatus
from runners.contracts.errors import (
    InvalidRequest,
    Overloaded,
    RunnerUnavailable,
    TriptychError,
    Unauthorized,
)
from runners.contracts.validation import problems_of

logger = logging.getLogger("triptych.api")

P = ParamSpec("P")

RETRY_UNAVAILABLE_S = 5
"""`Retry-After` of a model that is not ready, in seconds."""
MAX_PROBLEMS = 4
"""How many validation problems one message names."""
MAX_LISTED = 10_000
"""How many validation problems are looked at: more would delay all other requests."""


def status_of(error: Exception) -> ErrorStatus:
    """HTTP status, type and code of an error; 500 for unexpected errors."""
    error_format = current_error_format()
    statuses = error_format.statuses
    classes = type(error).__mro__
    return next((statuses[cls] for cls in classes if cls in statuses), error_format.internal)


def error_body(error: Exception) -> str:
    """An error as JSON. Unexpected errors are logged and not described."""
    error_format, status = current_error_format(), status_of(error)
    if isinstance(error, TriptychError) and status is not error_format.internal:
        return error_format.body(error.message, status, error.field)
    log_unexpected(error)
    message = "unexpected error; the server's log has the details under this request id"
    return error_format.body(message, status, None)


def error_response(error: Exception) -> Response:
    """The HTTP response to an error."""
    headers = {}
    match error:
        case Overloaded():
            headers["Retry-After"] = str(error.retry_after_s)
        case RunnerUnavailable():
            headers["Retry-After"] = str(RETRY_UNAVAILABLE_S)
        case Unauthorized():
            headers["WWW-Authenticate"] = "Bearer"
    body, status = error_body(error), status_of(error).status
    return Response(body, status, headers, media_type="application/json")


def as_response(
    handler: Callable[P, Awaitable[Response]],
) -> Callable[P, Awaitable[Response]]:
    """A handler that returns its errors as responses instead of raising them."""

    @functools.wraps(handler)
    async def respond(*args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            return await handler(*args, **kwargs)
        except Exception as error:
            return error_response(error)

    return respond


def unknown_route_response(status: int, method: str, path: str, allow: str | None) -> Response:
    """The HTTP response to an unknown path (404) or a method that a path does not take (405).

    `allow`: the path's methods, separated by commas.
    """
    path = path[:100]
    methods = sorted(allow.split(", ")) if allow else []
    if methods:
        message = f"{path} takes {' or '.join(methods)}, not {method}"
    else:
        message = f"there is no {method} {path}"
    error_format = current_error_format()
    is_method = status == error_format.unknown_method.status
    error_status = error_format.unknown_method if is_method else error_format.unknown_path
    headers = {"Allow": ", ".join(methods)} if methods else {}
    body = error_format.body(message, error_status, None)
    return Response(body, status, headers, media_type="application/json")


def plain_error_response(status: int, message: str) -> Response:
    """An error of which only the HTTP status and a sentence are known."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = current_error_format().body(message, ErrorStatus(status, kind), None)
    return Response(body, status, media_type="application/json")


def log_unexpected(error: BaseException) -> None:
    """Log an unexpected error as its type and stack: its message may quote the request."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    route = current_request().route
    logger.error("a request on %s failed with %s\n%s", route, type(error).__name__, stack)


def invalid_request(error: ValidationError) -> InvalidRequest:
    """A validation error as one that names the fields at fault and what is allowed there."""
    if error.error_count() > MAX_LISTED:
        return InvalidRequest(f"the body has {error.error_count()} errors, too many to list")
    by_field: dict[str, list[str]] = {}
    for problem in problems_of(error):
        by_field.setdefault(problem.field[:100], []).append(problem.requirement)
    requirements = {field: " or ".join(texts) for field, texts in by_field.items()}
    [(field, reason), *others] = requirements.items()
    parts = [reason, *(f"{name}: {text}" if name else text for name, text in others)]
    more = len(parts) - MAX_PROBLEMS
    if more > 0:
        parts[MAX_PROBLEMS:] = [f"and {more} more"]
    return InvalidRequest("; ".join(parts), field=field or None)
