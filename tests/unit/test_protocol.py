"""Odd and hostile clients, and shutdown, over real connections to a small app."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http import protocol
from api.http.context import current_request
from api.http.errors import as_response
from api.http.middleware import RequestContextMiddleware
from api.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED
from api.http.server import HttpServer
from api.http.sse import stream_response

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Running:
    """A server of `app`, in the event loop of the test."""

    def __init__(self, app: ASGIApp, *, grace: int | None = None) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        # `bentoml serve` has the socket too.
        self.of_parent = self.listener.dup()
        self.address: tuple[str, int] = self.listener.getsockname()
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, timeout_graceful_shutdown=grace
        )
        self.server = HttpServer(config)

    async def __aenter__(self) -> Running:
        self.task = asyncio.create_task(self.server.serve([self.listener]))
        while not self.server.started:
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        await asyncio.wait_for(self.task, 10)
        self.of_parent.close()

    async def send(self, *parts: bytes, pause: float = 0) -> bytes:
        """Send on a new connection and return all that comes until it is closed."""
        reader, writer = await asyncio.open_connection(*self.address)
        with contextlib.closing(writer):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause)
            return await asyncio.wait_for(reader.read(), 5)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with Running(hello) as running:
        yield running


@pytest.fixture(autouse=True)
def _other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpServer, "is_draining", False)


def error_of(response: bytes) -> tuple[int, str]:
    """Status and message of the only response."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["message"]


TOO_MUCH = b"a" * (8 * MAX_HEAD_BYTES)
"""More than the limit, and than what the event loop reads at a time."""


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"X-A: " + TOO_MUCH,
        HEAD + TOO_MUCH,
        HEAD + b"X-A: " + TOO_MUCH + b"\r\n\r\n",
        HEAD + b"X-A: a\r\n" * MAX_HEADERS + b"\r\n",
        b"GET /" + TOO_MUCH,
        b"GET /?" + TOO_MUCH + b" HTTP/1.1\r\n\r\n",
        b"\r\n" * (4 * MAX_HEAD_BYTES),
        CHUNKED + b"1;" + TOO_MUCH,
    ],
    ids=["value", "name", "whole", "many", "path", "query", "line ends", "chunk extension"],
)
async def test_what_never_ends_is_refused(running: Running, sent: bytes) -> None:
    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    running.server.config.loaded_app = waiting
    pieces = [sent[i : i + 4000] for i in range(0, len(sent), 4000)]
    for parts in ([sent], pieces):
        assert error_of(await running.send(*parts))[0] == 431


async def test_a_trailer_that_never_ends_closes_the_connection(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 60.0)
    response = await running.send(CHUNKED + b"1\r\na\r\n0\r\nX-A: ", TOO_MUCH, TOO_MUCH)
    assert response.startswith(b"HTTP/1.1 200")
    assert response.endswith(b"hi")


async def test_headers_within_the_limits_pass(running: Running) -> None:
    filler = [b"X-%d: %s\r\n" % (i, b"a" * 600) for i in range(MAX_HEADERS - 2)]
    request = HEAD + b"".join(filler) + b"Connection: close\r\n\r\n"
    assert len(request) < MAX_HEAD_BYTES
    assert (await running.send(request)).startswith(b"HTTP/1.1 200")


async def test_headers_that_do_not_arrive_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.05)
    async with Running(hello) as running:
        assert await running.send() == b""
        assert error_of(await running.send(HEAD))[0] == 408
        # The same on a connection that has served a request.
        first, _, second = (await running.send(HEAD + b"\r\n", HEAD, pause=0.02)).partition(b"hi")
        assert first.startswith(b"HTTP/1.1 200")
        assert error_of(second)[0] == 408


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /a%0Ab HTTP/1.1",
        b"GET /%1B[31m HTTP/1.1",
        b"GET /%C2%9B31m HTTP/1.1",
        b"GET /%E2%80%AE HTTP/1.1",
        b"POST /generate%0a HTTP/1.1",
        b"POST /generate HTTP/1.1\r\nContent-Type: \xff",
    ],
)
async def test_no_request_can_write_lines_into_the_log(
    running: Running, request_line: bytes
) -> None:
    assert error_of(await running.send(request_line + b"\r\nHost: x\r\n\r\n"))[0] == 400


async def test_printable_paths_pass(running: Running) -> None:
    request = (
        b"GET /v1/models/%C3%A9t%C3%A9%20x?a=%0A HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    assert (await running.send(request)).startswith(b"HTTP/1.1 200")


async def test_garbage_behind_a_request_does_not_touch_its_response(running: Running) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await asyncio.sleep(0.01)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body"})

    running.server.config.loaded_app = slow
    response = await running.send(HEAD + b"\r\n", b"GARBAGE\r\n\r\n", b"MORE")
    assert response.endswith(b"\r\n\r\n" + b"1\r\nx\r\n" * 3 + b"0\r\n\r\n")
    assert response.count(b"HTTP/1.1") == 1


async def test_the_requests_that_wait_on_one_connection_are_bounded(running: Running) -> None:
    response = await running.send((HEAD + b"\r\n") * 1000)
    assert response.count(b"HTTP/1.1 200") == MAX_PIPELINED + 1


@pytest.mark.parametrize("waiting", [0, 1, 3])
async def test_a_client_that_leaves_is_noticed(running: Running, waiting: int) -> None:
    """Also if it has sent requests that wait for the response to the first."""
    started, left = asyncio.Event(), asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    running.server.config.loaded_app = endless
    _, writer = await asyncio.open_connection(*running.address)
    writer.write((HEAD + b"\r\n") * (1 + waiting))
    await asyncio.wait_for(started.wait(), 5)
    writer.close()
    await asyncio.wait_for(left.wait(), 5)


async def test_a_response_can_be_read_by_a_client_that_still_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.1)
    async with Running(hello) as running:
        head = POST + b"Content-Length: 1000000\r\n\r\n"
        response = await running.send(head, *[b"a" * 1000] * 100)
        assert response.startswith(b"HTTP/1.1 200")
        # One that sends everything keeps its connection.
        response = await running.send(
            POST + b"Content-Length: 200000\r\n\r\n",
            b"a" * 200_000,
            HEAD + b"Connection: close\r\n\r\n",
        )
        assert response.count(b"HTTP/1.1 200") == 2


async def test_a_stream_to_an_old_client_has_no_chunks(running: Running) -> None:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    assert (await running.send(b"GET / HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\nhi")
    running.server.config.loaded_app = stream
    response = await running.send(b"GET / HTTP/1.0\r\n\r\n")
    assert b"transfer-encoding" not in response
    assert response.endswith(b"\r\n\r\none two")


def gated(gate: asyncio.Event) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await hello(scope, receive, send)

    return app


async def test_a_drain_refuses_connections_and_finishes_requests() -> None:
    gate = asyncio.Event()
    async with Running(gated(gate)) as running:
        in_flight = asyncio.create_task(running.send(HEAD + b"\r\n"))
        reader, writer = await asyncio.open_connection(*running.address)
        await asyncio.sleep(0.05)
        running.server.should_exit = True
        while not HttpServer.is_draining:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*running.address)
        # A connection that was open before may still send its request, but only one.
        writer.write(HEAD + b"\r\n")
        await asyncio.sleep(0.05)
        gate.set()
        for response in (await reader.read(), await in_flight):
            assert response.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in response
            assert response.endswith(b"hi")
        writer.close()


async def test_requests_beyond_the_grace_period_are_told(caplog: pytest.LogCaptureFixture) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        async with current_request().within_deadline():
            await asyncio.Event().wait()

    @as_response
    async def respond(path: str) -> Response:
        if path == "/stream":
            return await stream_response(endless(), error_event="error")
        async with current_request().within_deadline():
            await asyncio.Event().wait()
        return Response()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (await respond(scope["path"]))(scope, receive, send)

    async with Running(RequestContextMiddleware(app, timeout=60.0), grace=0) as running:
        requests = [
            asyncio.create_task(running.send(HEAD.replace(b" / ", path) + b"\r\n"))
            for path in (b" /stream ", b" /unary ")
        ]
        await asyncio.sleep(0.05)
    stream, unary = await asyncio.gather(*requests)
    assert b'event: error\ndata: {"error": {"message": "the server is shutting down' in stream
    assert stream.endswith(b"0\r\n\r\n")
    status, message = error_of(unary)
    assert (status, message) == (503, "the server is shutting down; the request was aborted")
    assert b"retry-after: 5" in unary
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_rolling_restart_loses_no_request() -> None:
    """Clients in a loop, some with connections they keep, go to whichever server accepts them."""
    servers = [Running(hello) for _ in range(2)]
    stop, served = asyncio.Event(), 0

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for running in servers:
            with contextlib.suppress(ConnectionRefusedError):
                return await asyncio.open_connection(*running.address)
        raise AssertionError("no server accepts connections")

    async def client(keeps: bool) -> None:
        nonlocal served
        last = b"\r\n" if keeps else b"Connection: close\r\n\r\n"
        reader = writer = None
        while not stop.is_set():
            if writer is None or reader is None:
                reader, writer = await connect()
            writer.write(HEAD + last)
            head = await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(2) == b"hi"
            served += 1
            if b"connection: close" in head:
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    async with servers[1]:
        async with servers[0]:
            clients = [asyncio.create_task(client(i % 2 == 0)) for i in range(8)]
            await asyncio.sleep(0.1)
        before = served
        await asyncio.sleep(0.1)
        stop.set()
        await asyncio.gather(*clients)
    assert served > before > 0
