"""Pure ASGI middlewares, outermost first: request context, API key, body, unknown routes."""

from __future__ import annotations

import asyncio
import hmac
import re
from asyncio import FIRST_COMPLETED
from uuid import uuid4

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http import metrics
from api.http.context import RequestContext, current_request, enter_request
from api.http.error_shapes import OPENAI, TORCHSERVE
from api.http.errors import error_response, log_unexpected, no_such_route
from runners.contracts.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, Unauthorized

REQUEST_ID = "X-Request-ID"
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
OPEN_PATHS = frozenset({"/livez", "/readyz", "/healthz", "/ping"})
PREDICTIONS = "/predictions"
"""TorchServe's route, which takes a body of any type."""
SEND_GRACE_S = 5.0
"""How long past its deadline a client may take to receive; one that reads nothing holds a place."""
CLIENT_LEFT = 499
"""nginx's status for it; nobody reads the answer, but logs and metrics do."""


class RequestContextMiddleware:
    """Gives each request its id and deadline, counts it, and closes what it leaves open."""

    def __init__(self, app: ASGIApp, *, timeout: float) -> None:
        self.app = app
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request from its first byte to its last clean-up."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(REQUEST_ID, "")
        route = metrics.route_label(scope["path"])
        theirs = route in metrics.TORCHSERVE
        if theirs:  # there a slash at the end means nothing
            scope = {**scope, "path": scope["path"].rstrip("/")}
        context = RequestContext(
            request_id=given if SANE_REQUEST_ID.fullmatch(given) else uuid4().hex,
            route=route,
            timeout=self.timeout,
            error_shape=TORCHSERVE if theirs else OPENAI,
        )
        enter_request(context)
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = context.request_id
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except Exception as error:
            if status:  # too late for an answer: the server cuts the connection
                log_unexpected(error)
            else:
                await error_response(error)(scope, receive, tagged)
        finally:
            await context.resources.aclose()
            metrics.REQUESTS.labels(context.route, status or CLIENT_LEFT).inc()
            elapsed = asyncio.get_running_loop().time() - context.arrived
            metrics.DURATION.labels(context.route).observe(elapsed)


class ApiKeyMiddleware:
    """Asks for `Authorization: Bearer <key>` everywhere but at the health probes."""

    def __init__(self, app: ASGIApp, *, key: SecretStr) -> None:
        self.app = app
        self.key = key.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 401."""
        if scope["type"] == "http" and not self._may_pass(scope):
            error = Unauthorized("this server asks for its API key as Authorization: Bearer <key>")
            return await error_response(error)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        # OPTIONS: a CORS preflight can not carry the header, and its answer holds nothing.
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)


class BodyMiddleware:
    """Reads the body, within its limit, and ends the handler when the client leaves.

    Neither BentoML nor FastAPI ends a unary handler whose client is gone. The body is read here
    because only then is a disconnect the one thing left to receive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with its body read."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            async with current_request().within_deadline():
                body = await self._read(scope, receive)
        except Exception as error:
            return await error_response(error)(scope, receive, send)
        if body is None:
            return await _nobody_there(scope, receive, send)
        return await self._serve(scope, receive, send, body)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self.max_bytes:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                break
        content_type = headers.get("content-type", "application/json").partition(";")[0]
        # Of any type are TorchServe's bodies; and where there is no route, that is what to say.
        json_alone = current_request().route not in (PREDICTIONS, metrics.NO_ROUTE)
        if body and json_alone and content_type.strip().lower() != "application/json":
            raise InvalidRequest("must be application/json", field="Content-Type")
        return bytes(body)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body may have {self.max_bytes} bytes at most")

    async def _serve(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Run the app until it is done, the client has left, or it does not take its answer."""
        started = answered = False
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.ensure_future(receive())

        async def replay() -> Message:
            return pending.pop() if pending else await asyncio.shield(gone)

        async def watched(message: Message) -> None:
            nonlocal started, answered
            started = True
            await send(message)
            last = not message.get("more_body", False)
            answered = message["type"] == "http.response.body" and last

        handler = asyncio.ensure_future(self.app(scope, replay, watched))
        try:
            patience = current_request().remaining + SEND_GRACE_S
            await asyncio.wait({handler, gone}, timeout=patience, return_when=FIRST_COMPLETED)
            # Once all is sent the server, too, reports a disconnect; what is left is clean-up.
            if not handler.done() and not answered:
                handler.cancel()
            await asyncio.wait({handler})
        finally:
            left = gone.done()
            handler.cancel()
            gone.cancel()
            await asyncio.gather(handler, gone, return_exceptions=True)
        if not handler.cancelled():
            handler.result()
        elif left:
            await _nobody_there(scope, receive, send)
        elif not started:
            raise DeadlineExceeded("the request took too long")


class UnknownRouteMiddleware:
    """Puts the plain-text 404 and 405 of BentoML's router into the shape of all other errors."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        replaced = False

        async def worded(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] in (404, 405):
                headers = Headers(raw=message["headers"])
                replaced = headers.get("content-type", "").startswith("text/plain")
                if replaced:
                    route = (scope["method"], scope["path"], headers.get("allow"))
                    await no_such_route(message["status"], *route)(scope, receive, send)
            if not replaced:
                await send(message)

        return await self.app(scope, receive, worded)


async def _nobody_there(scope: Scope, receive: Receive, send: Send) -> None:
    """End a request whose client has left: BentoML's timer waits for an answer to be sent."""
    await Response(status_code=CLIENT_LEFT)(scope, receive, send)
