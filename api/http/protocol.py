"""uvicorn's HTTP protocol, with limits on what a client may send before its request is complete.

uvicorn bounds neither the size, the number nor the duration of headers, and appends each fragment
of a header to those before it. All limits here hold before the API key is looked at.
"""

from __future__ import annotations

import asyncio
import http
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, cast

import httptools
from starlette.types import Message, Send
from typing_extensions import override
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from api.http.error_formats import OPENAI, ErrorStatus

MAX_HEAD_BYTES = 64 * 1024
"""Limit of the request line and all headers of a request, trailers included."""
MAX_HEADERS = 100
MAX_PIPELINED = 16
"""Requests of one connection that may wait for the response to an earlier one."""
HEAD_TIMEOUT_S = 20.0
"""Seconds until the headers of a request have to be complete."""
LINGER_S = 5.0
"""Seconds for which the rest of a request is discarded after its response."""
DRAIN_IDLE_S = 1.0
"""Seconds in which an idle connection may still send a request when the server shuts down."""


class _Refusal(NamedTuple):
    """Why a request is refused."""

    message: str
    status: ErrorStatus


KIND = "invalid_request_error"
MALFORMED = _Refusal("the request is not valid HTTP/1.1", ErrorStatus(400, KIND))
UNPRINTABLE = _Refusal(
    "the path must consist of printable characters, and Content-Type of ASCII",
    ErrorStatus(400, KIND),
)
TIMED_OUT = _Refusal(
    f"the headers were not complete within {HEAD_TIMEOUT_S:g} s",
    ErrorStatus(408, KIND, "request_timeout"),
)
TOO_LARGE = _Refusal(
    f"the request line and the headers exceed the limit of {MAX_HEAD_BYTES} bytes, or of "
    f"{MAX_HEADERS} headers",
    ErrorStatus(431, KIND, "headers_too_large"),
)


class _Refused(Exception):
    """Raised in a callback of the parser, which then stops."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection; uvicorn creates an instance for each."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._timer: asyncio.TimerHandle | None = None
        self._expects_head = True
        self._unparsed = 0
        """Bytes since the last event of the parser, which holds them."""
        self._head_bytes = 0
        self._is_deaf = False
        """Whether what else the client sends is discarded."""
        self._is_draining = False
        self._running: RequestResponseCycle | None = None
        """The request whose handler runs; `cycle` is the last one that was read."""
        self._refusal = MALFORMED

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer(HEAD_TIMEOUT_S, self._head_timed_out)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._is_deaf:
            return
        if self._unparsed > MAX_HEAD_BYTES:
            self._refuse(TOO_LARGE)
        elif self._timer is None and self._expects_head and (self._unparsed or self._head_bytes):
            self._start_timer(HEAD_TIMEOUT_S, self._head_timed_out)

    @override
    def shutdown(self) -> None:
        """Called when the server begins to shut down: let the client finish what it has begun."""
        self._is_draining = True
        if (last := self._last_cycle()) is not None:
            last.keep_alive = False
        else:
            # A client that has just sent a request must not lose it.
            self._start_timer(DRAIN_IDLE_S, self.transport.close)

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._unparsed = 0

    @override
    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if not value.isascii() and name.lower() == b"content-type":
            self._stop(UNPRINTABLE)
        super().on_header(name, value)

    @override
    def on_headers_complete(self) -> None:
        self._stop_timer()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(MALFORMED)
        # BentoML logs the path, and Starlette's routes ignore a line end behind it.
        if b"%" in self.url and not urllib.parse.unquote(_path_of(self.url)).isprintable():
            self._stop(UNPRINTABLE)
        self._expects_head, self._unparsed = False, 0
        previous = self.cycle
        super().on_headers_complete()
        if self.cycle is previous:  # a WebSocket
            return
        if 0 < len(self.pipeline) < MAX_PIPELINED:
            self.flow.resume_reading()  # only who reads notices a client that leaves
        if self._is_draining:
            self.cycle.keep_alive = False
        if self.scope["http_version"] == "1.0":
            send_until_close(self.cycle)

    @override
    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._expects_head, self._unparsed, self._head_bytes = True, 0, 0
        if self.cycle is not None and self.cycle.response_complete:
            self._stop_timer()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._expects_head and self._last_cycle() is None:
            self._start_timer(LINGER_S, self.transport.close)

    @override
    def send_400_response(self, msg: str) -> None:
        """Called when the parser fails, or a callback of it."""
        self._refuse(self._refusal)

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _count(self, size: int) -> None:
        self._unparsed = 0
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            self._stop(TOO_LARGE)

    def _stop(self, refusal: _Refusal) -> NoReturn:
        self._refusal = refusal
        raise _Refused

    def _last_cycle(self) -> RequestResponseCycle | None:
        """The last request without a complete response."""
        if self.pipeline:
            return self.pipeline[0][0]
        if self.cycle is None or self.cycle.response_complete:
            return None
        return self.cycle

    def _head_timed_out(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # the client waits for us
            self._start_timer(HEAD_TIMEOUT_S, self._head_timed_out)
        elif self._unparsed or self._head_bytes:
            self._refuse(TIMED_OUT)
        else:
            self.transport.close()

    def _refuse(self, refusal: _Refusal) -> None:
        """Close after the due responses, or answer with an error; read no further request."""
        self._is_deaf = True
        self._stop_timer()
        is_in_body = not self._expects_head
        if is_in_body and self.pipeline:
            self.pipeline.popleft()
            is_in_body = False
        last = self._last_cycle()
        if last is not None and not is_in_body:
            last.keep_alive = False
        elif last is not None and last.response_started:
            self.transport.close()
        else:
            if last is not None or not is_in_body:
                self._respond(refusal)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            # A client that still sends could not read the response if this closed at once.
            self._start_timer(LINGER_S, self.transport.close)

    def _respond(self, refusal: _Refusal) -> None:
        body = OPENAI.body(refusal.message, refusal.status, None).encode()
        status = http.HTTPStatus(refusal.status.status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.cycle is not None:  # its handler may wait for the rest of the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _start_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def send_until_close(cycle: RequestResponseCycle) -> None:
    """Let a response without Content-Length end with the connection.

    uvicorn would send it in chunks, which HTTP/1.0 does not have.
    """
    send: Send = cast("Send", cycle.send)
    is_unframed = False

    async def send_unframed(message: Message) -> None:
        nonlocal is_unframed
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            is_unframed = names.isdisjoint({b"content-length", b"transfer-encoding"})
            if is_unframed:
                cycle.chunked_encoding = False
        elif is_unframed and message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    setattr(cycle, "send", send_unframed)  # noqa: B010 - mypy forbids to assign methods


def _path_of(url: bytes) -> str:
    return str(httptools.parse_url(url).path, "ascii")
