"""Pure ASGI middlewares, outermost first: request context, API key, body, errors."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from asyncio import FIRST_COMPLETED
from uuid import uuid4

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http import metrics
from api.http.context import RequestContext, current_request, enter_request
from api.http.error_formats import OPENAI, TORCHSERVE
from api.http.errors import (
    error_response,
    log_unexpected,
    plain_error_response,
    unknown_route_response,
)
from runners.contracts.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    SlowRequest,
    Unauthorized,
    UnsupportedMediaType,
)

REQUEST_ID = "X-Request-ID"
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
OPEN_PATHS = frozenset({"/livez", "/readyz", "/healthz", "/health", "/ping"})
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
PREDICTIONS = "/predictions"
TORCHSERVE_ROOTS = frozenset({"ping", "predictions", "models"})
"""The first parts of TorchServe's paths."""
SEND_GRACE_S = 5.0
"""Seconds past its deadline until a request is cut off whose client reads nothing."""
BODY_TIMEOUT_S = 30.0
"""Seconds a body may take to arrive, plus those that it takes at `BODY_MIN_RATE`."""
BODY_MIN_RATE = 4096
"""Bytes per second."""
RECEIVING_LIMIT = 64 * 1024 * 1024
"""Bytes of all bodies that are being received; at least twice the limit of one body."""
CLIENT_DISCONNECTED = 499
"""nginx's status for it, which only logs and metrics show."""


class RequestContextMiddleware:
    """Gives each request its id and deadline, counts it, and releases its resources."""

    def __init__(self, app: ASGIApp, *, timeout: float) -> None:
        self.app = app
        self.timeout = timeout
        self._labels: metrics.RouteLabels | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request from its first byte to the release of its resources."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        root = scope["path"].lstrip("/").partition("/")[0]
        is_torchserve = root in TORCHSERVE_ROOTS
        scope = {
            **scope,
            "path": scope["path"].rstrip("/") or "/",
            # Whatever takes GET takes HEAD; uvicorn, which has its own scope, sends no body.
            "method": "GET" if scope["method"] == "HEAD" else scope["method"],
        }
        client_id = Headers(scope=scope).get(REQUEST_ID, "")
        context = RequestContext(
            request_id=client_id if VALID_REQUEST_ID.fullmatch(client_id) else uuid4().hex,
            route=self._label(scope),
            timeout=self.timeout,
            error_format=TORCHSERVE if is_torchserve else OPENAI,
        )
        enter_request(context)
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = context.request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status is None:
                await error_response(error)(scope, receive, send_with_id)
            else:  # the response has begun: the server closes the connection
                log_unexpected(error)
        finally:
            await context.resources.aclose()
            if status is None:
                status = CLIENT_DISCONNECTED
            metrics.REQUESTS.labels(context.route, status).inc()
            elapsed = asyncio.get_running_loop().time() - context.arrived
            metrics.DURATION.labels(context.route).observe(elapsed)

    def _label(self, scope: Scope) -> str:
        if self._labels is None:
            # Not in the constructor: BentoML adds routes to its app after the middlewares.
            app = scope.get("app")
            self._labels = metrics.RouteLabels([] if app is None else app.routes)
        return self._labels.label(scope["path"])


class ApiKeyMiddleware:
    """Requires the key, as bearer token or in `x-api-key`, everywhere but for the health probes."""

    def __init__(self, app: ASGIApp, *, key: SecretStr) -> None:
        self.app = app
        self.key = key.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 401."""
        if scope["type"] == "http" and not self._may_pass(scope):
            error = Unauthorized("this server requires its API key, as Authorization: Bearer <key>")
            return await error_response(error)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        # OPTIONS: a CORS preflight cannot carry the header, and its response has no content.
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        keys = [key if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"")]
        return any(hmac.compare_digest(each.strip(), self.key) for each in keys)


class BodyMiddleware:
    """Reads the body, up to its limit, and cancels the handler when the client disconnects.

    Neither BentoML nor FastAPI cancels a handler that does not stream. The body is read here
    because afterwards a disconnect is the only message that matters. Where no handler uses a body,
    none is kept.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self._receiving_limit = max(RECEIVING_LIMIT, 2 * max_bytes)
        self._receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with its body read."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body: bytes | None = b""
        if self._uses_body(scope):
            try:
                async with current_request().within_deadline():
                    body = await self._read(scope, receive)
            except Exception as error:
                return await error_response(error)(scope, receive, send)
        if body is None:
            return await _respond_to_disconnected(scope, receive, send)
        return await self._serve(scope, receive, send, body)

    def _uses_body(self, scope: Scope) -> bool:
        has_route = current_request().route != metrics.NO_ROUTE
        is_probe = scope["path"] in OPEN_PATHS
        return scope["method"] in METHODS_WITH_BODY and has_route and not is_probe

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client disconnects before its end.

        Raises: PayloadTooLarge, UnsupportedMediaType, InvalidRequest, SlowRequest, Overloaded.
        """
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self.max_bytes:
            raise self._too_large()
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType("bodies must not be compressed", field="Content-Encoding")
        body = await self._receive_all(receive)
        content_type = headers.get("content-type", "application/json").partition(";")[0]
        # TorchServe takes bodies of any type.
        only_json = current_request().route != PREDICTIONS
        if body and only_json and content_type.strip().lower() != "application/json":
            raise InvalidRequest("must be application/json", field="Content-Type")
        return body

    async def _receive_all(self, receive: Receive) -> bytes | None:
        body = bytearray()
        start = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(start + BODY_TIMEOUT_S) as limit:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    body += part
                    self._receiving += len(part)
                    if len(body) > self.max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
                    if self._receiving > self._receiving_limit:
                        raise Overloaded("the server is receiving too many bodies; try again")
                    limit.reschedule(start + BODY_TIMEOUT_S + len(body) / BODY_MIN_RATE)
        except TimeoutError:
            if not limit.expired():
                raise
            raise SlowRequest(f"the body was not complete within {BODY_TIMEOUT_S:g} s") from None
        finally:
            self._receiving -= len(body)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body exceeds the limit of {self.max_bytes} bytes")

    async def _serve(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Run the app until it is done, the client disconnects, or does not read the response."""
        started = complete = False
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        disconnect = asyncio.ensure_future(_disconnected(receive))

        async def replay() -> Message:
            return pending.pop() if pending else await asyncio.shield(disconnect)

        async def watched_send(message: Message) -> None:
            nonlocal started, complete
            started = True
            await send(message)
            last = not message.get("more_body", False)
            complete = message["type"] == "http.response.body" and last

        handler = asyncio.ensure_future(self.app(scope, replay, watched_send))
        try:
            timeout = current_request().remaining + SEND_GRACE_S
            await asyncio.wait({handler, disconnect}, timeout=timeout, return_when=FIRST_COMPLETED)
            # After a complete response the server reports a disconnect too; the handler then only
            # has to clean up, which is not cancelled.
            if not handler.done() and not complete:
                handler.cancel()
            await asyncio.wait({handler})
        finally:
            disconnected = disconnect.done()
            handler.cancel()
            disconnect.cancel()
            await asyncio.gather(handler, disconnect, return_exceptions=True)
        if not handler.cancelled():
            handler.result()
        elif disconnected:
            await _respond_to_disconnected(scope, receive, send)
        elif not started:
            raise DeadlineExceeded("the request exceeded its time limit")


class BentoErrorsMiddleware:
    """Turns errors of BentoML into the format of all others.

    Its router answers 404 and 405 in plain text, the routes of its jobs with `{"error": message}`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        error_start: Message | None = None
        replaced = False

        async def send_formatted(message: Message) -> None:
            nonlocal error_start, replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                error_start = message
            elif error_start is None:
                await send(message)
            elif not replaced:
                response = _formatted(scope, error_start, message)
                replaced = response is not None
                if response is not None:
                    await response(scope, receive, send)
                else:
                    start, error_start = error_start, None
                    await send(start)
                    await send(message)

        return await self.app(scope, receive, send_formatted)


def _formatted(scope: Scope, start: Message, body: Message) -> Response | None:
    """BentoML's error response in the format of all others; None if it is another response."""
    headers, status = Headers(raw=start["headers"]), start["status"]
    content_type = headers.get("content-type", "")
    if status in (404, 405) and content_type.startswith("text/plain"):
        return unknown_route_response(status, scope["method"], scope["path"], headers.get("allow"))
    if content_type.startswith("application/json") and not body.get("more_body", False):
        content = json.loads(body.get("body", b"null"))
        if isinstance(content, dict) and isinstance(message := content.get("error"), str):
            return plain_error_response(status, message)
    return None


async def _disconnected(receive: Receive) -> Message:
    """Wait for the message that the client has left; a body that is not used is discarded."""
    while (message := await receive())["type"] == "http.request":
        pass
    return message


async def _respond_to_disconnected(scope: Scope, receive: Receive, send: Send) -> None:
    """End a request whose client has disconnected: BentoML's timer waits for a response."""
    await Response(status_code=CLIENT_DISCONNECTED)(scope, receive, send)
