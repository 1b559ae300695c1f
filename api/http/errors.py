"""Errors on the wire, in the shape that the route's clients know (`error_shapes`).

No message repeats what a body holds.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import ParamSpec

from pydantic import ValidationError
from starlette.responses import Response

from api.http.context import current_request, current_shape
from api.http.error_shapes import Kind
from runners.contracts.errors import InvalidRequest, Overloaded, TriptychError, Unauthorized
from runners.contracts.validation import problems_of

logger = logging.getLogger("triptych.api")

P = ParamSpec("P")

MAX_PROBLEMS = 4
"""How many validation problems one message names."""
MAX_LISTED = 10_000
"""Describing more problems than this would hold up all other requests."""


def kind_of(error: Exception) -> Kind:
    """Status, type and code of an error; a 500 for what nobody raises on purpose."""
    shape = current_shape()
    classes = type(error).__mro__
    return next((shape.kinds[cls] for cls in classes if cls in shape.kinds), shape.internal)


def error_body(error: Exception) -> str:
    """An error as JSON. What nobody raises on purpose is logged here and not described."""
    shape, kind = current_shape(), kind_of(error)
    if isinstance(error, TriptychError) and kind is not shape.internal:
        return shape.body(error.message, kind, error.field)
    log_unexpected(error)
    return shape.body("the server failed on this request; its log has the request id", kind, None)


def error_headers(error: Exception) -> dict[str, str]:
    """What a client needs besides the body: when to come back, how to authenticate."""
    match error:
        case Overloaded():
            return {"Retry-After": str(error.retry_after_s)}
        case Unauthorized():
            return {"WWW-Authenticate": "Bearer"}
        case _:
            return {}


def error_response(error: Exception) -> Response:
    """The HTTP answer to an error."""
    body, status, headers = error_body(error), kind_of(error).status, error_headers(error)
    return Response(body, status, headers, media_type="application/json")


def as_response(
    handler: Callable[P, Awaitable[Response]],
) -> Callable[P, Awaitable[Response]]:
    """A handler that answers with its errors instead of raising them."""

    @functools.wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            return await handler(*args, **kwargs)
        except Exception as error:
            return error_response(error)

    return answer


def no_such_route(status: int, method: str, path: str, allow: str | None) -> Response:
    """The HTTP answer to a path (404) or a method (405) that does not exist."""
    path = path[:100]
    methods = sorted(allow.split(", ")) if allow else []
    allow = ", ".join(methods)
    message = (
        f"{path} takes {' or '.join(methods)}, not {method}"
        if allow
        else f"there is no {method} {path} here"
    )
    shape = current_shape()
    kind = shape.not_allowed if status == shape.not_allowed.status else shape.unknown
    headers = {"Allow": allow} if allow else {}
    body = shape.body(message, kind, None)
    return Response(body, status, headers, media_type="application/json")


def log_unexpected(error: BaseException) -> None:
    """Log a fault of ours as its type and place: the message might quote what a client sent."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    request = current_request()
    logger.error(
        "request %s on %s failed with %s\n%s",
        request.request_id,
        request.route,
        type(error).__name__,
        stack,
    )


def refusal(error: ValidationError) -> InvalidRequest:
    """A validation error as the error for the client: which field, and what is allowed there."""
    if error.error_count() > MAX_LISTED:
        return InvalidRequest(f"the body has {error.error_count()} faults, too many to name")
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
