"""The middlewares over an ASGI app in memory: what servers and clients can not be made to do."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.context import abort_requests, current_request
from api.http.middleware import ApiKeyMiddleware, BodyMiddleware, RequestContextMiddleware
from runners.contracts.errors import EngineFailure, RunnerUnavailable

SECRET = "swordfish"
ROUTED = Starlette(
    routes=[Route(path, lambda _: JSONResponse({})) for path in ("/generate", "/livez")]
)
"""The app whose routes tell which requests have a use for a body."""


class Exchange:
    """One request to an app: the client's messages, and what came back."""

    def __init__(self, *messages: Message, headers: dict[bytes, bytes] | None = None) -> None:
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/generate",
            "headers": list((headers or {}).items()),
            "app": ROUTED,
        }
        self.sent: list[Message] = []
        self.answered = asyncio.Event()
        self._messages = list(messages)
        self.leave = asyncio.Event()

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.answered.set()

    async def over(self, app: ASGIApp) -> Exchange:
        await app(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> dict[str, Any]:
        body = b"".join(message.get("body", b"") for message in self.sent[1:])
        found: dict[str, Any] = json.loads(body)["error"]
        return found


def body(content: bytes = b"{}", *, more: bool = False) -> Message:
    return {"type": "http.request", "body": content, "more_body": more}


def stack(app: ASGIApp, *, max_bytes: int = 100, timeout: float = 5.0) -> ASGIApp:
    return RequestContextMiddleware(BodyMiddleware(app, max_bytes=max_bytes), timeout=timeout)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    await JSONResponse({"length": len(message["body"])})(scope, receive, send)


async def test_the_app_gets_the_whole_body_at_once() -> None:
    exchange = Exchange(body(b'{"a', more=True), body(b'":1}'))
    assert (await exchange.over(stack(echo))).status == 200
    assert exchange.sent[1]["body"] == b'{"length":7}'


async def test_the_rest_of_a_large_body_is_not_read() -> None:
    messages = [body(b" " * 60, more=True) for _ in range(5)]
    exchange = await Exchange(*messages).over(stack(echo))
    assert exchange.status == 413
    assert len(exchange._messages) == 3


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/generate"), ("OPTIONS", "/generate"), ("POST", "/livez")]
)
async def test_a_body_that_nobody_uses_is_not_kept(method: str, path: str) -> None:
    exchange = Exchange(body(b" " * 60, more=True), body(b" " * 60, more=True))
    exchange.scope["method"], exchange.scope["path"] = method, path
    assert (await exchange.over(stack(echo))).status == 200
    assert exchange.sent[1]["body"] == b'{"length":0}'


async def test_a_client_that_leaves_with_an_unread_body_ends_the_handler() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    exchange = Exchange(body(b"a", more=True), body(b"a"))
    exchange.scope["method"] = "GET"
    exchange.leave.set()
    assert (await asyncio.wait_for(exchange.over(stack(slow)), 1)).status == 499


async def test_a_body_that_trickles_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.middleware.BODY_TIMEOUT_S", 0.05)
    exchange = await asyncio.wait_for(Exchange(body(b"{", more=True)).over(stack(echo)), 1)
    assert exchange.status == 408
    assert exchange.error["code"] == "request_timeout"


async def test_the_time_for_a_body_grows_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.middleware.BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr("api.http.middleware.BODY_MIN_RATE", 1)
    exchange = Exchange(body(b"{", more=True))
    call = asyncio.create_task(exchange.over(stack(echo)))
    await asyncio.sleep(0.1)
    assert not call.done()
    exchange.leave.set()
    assert (await call).status == 499


async def test_the_bodies_that_are_being_received_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.http.middleware.RECEIVING_LIMIT", 200)
    app = stack(echo, max_bytes=100)
    waiting = [Exchange(body(b" " * 90, more=True)) for _ in range(2)]
    calls = [asyncio.create_task(exchange.over(app)) for exchange in waiting]
    await asyncio.sleep(0.01)
    refused = await Exchange(body(b" " * 90, more=True)).over(app)
    assert refused.status == 429
    assert (b"retry-after", b"1") in refused.sent[0]["headers"]
    for exchange in waiting:
        exchange.leave.set()
    await asyncio.gather(*calls)
    assert (await Exchange(body(b" " * 90, more=True), body()).over(app)).status == 200


@pytest.mark.parametrize(("encoding", "status"), [(b"gzip", 415), (b"br", 415), (b"identity", 200)])
async def test_compressed_bodies_are_refused_by_name(encoding: bytes, status: int) -> None:
    exchange = await Exchange(body(), headers={b"content-encoding": encoding}).over(stack(echo))
    assert exchange.status == status
    if status == 415:
        assert exchange.error["message"].startswith("Content-Encoding: ")


async def test_a_model_that_is_not_ready_says_when_to_come_back() -> None:
    async def loading(scope: Scope, receive: Receive, send: Send) -> None:
        raise RunnerUnavailable("loading")

    exchange = await Exchange(body()).over(stack(loading))
    assert exchange.status == 503
    assert (b"retry-after", b"5") in exchange.sent[0]["headers"]


async def test_requests_in_flight_can_be_ended() -> None:
    async def working(scope: Scope, receive: Receive, send: Send) -> None:
        async with current_request().within_deadline():
            await asyncio.Event().wait()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.02)
        async with current_request().within_deadline():
            await asyncio.Event().wait()

    exchanges = [Exchange(body()), Exchange(body(b"{", more=True)), Exchange(body())]
    calls = [
        asyncio.create_task(exchange.over(stack(app)))
        for exchange, app in zip(exchanges, (working, echo, late), strict=True)
    ]
    await asyncio.sleep(0.01)
    abort_requests(RunnerUnavailable("the server is shutting down"))
    await asyncio.wait_for(asyncio.gather(*calls), 1)
    for exchange in exchanges:
        assert (exchange.status, exchange.error["code"]) == (503, "model_not_ready")


async def test_a_client_that_leaves_ends_the_handler_and_its_resources() -> None:
    closed: list[str] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        current_request().resources.callback(closed.append, "resource")
        try:
            await asyncio.Event().wait()
        finally:
            closed.append("handler")

    exchange = Exchange(body())
    call = asyncio.create_task(exchange.over(stack(slow)))
    await asyncio.sleep(0.01)
    exchange.leave.set()
    await asyncio.wait_for(call, 1)
    assert closed == ["handler", "resource"]
    assert exchange.status == 499


async def test_a_client_that_leaves_before_its_body_is_there() -> None:
    exchange = Exchange(body(b"{", more=True))
    exchange.leave.set()
    assert (await exchange.over(stack(echo))).status == 499


async def test_an_unfinished_generator_holds_nothing_back() -> None:
    """A stream that is cut while it sends is not closed by anyone but the garbage collector."""
    closed = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        current_request().resources.callback(closed.set)

        async def numbers() -> Any:
            while True:
                yield b"1"
                await asyncio.sleep(0)

        await StreamingResponse(numbers())(scope, receive, send)

    exchange = Exchange(body())
    call = asyncio.create_task(exchange.over(stack(endless)))
    await exchange.answered.wait()
    exchange.leave.set()
    await asyncio.wait_for(call, 1)
    assert closed.is_set()


async def test_clean_up_after_the_answer_is_not_cut_short() -> None:
    """Servers report a disconnect, too, once the answer is complete."""
    finished: list[bool] = []
    exchange = Exchange(body())

    async def with_background(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({})(scope, receive, send)
        exchange.leave.set()
        await asyncio.sleep(0.02)
        finished.append(True)

    await exchange.over(stack(with_background))
    assert finished == [True]
    assert [message.get("status") for message in exchange.sent] == [200, None]


async def test_a_client_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.middleware.SEND_GRACE_S", 0.05)
    closed = asyncio.Event()

    async def blocked(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        current_request().resources.callback(closed.set)
        await JSONResponse({})(scope, receive, send)

    exchange = Exchange(body())
    app = stack(answering, timeout=0.05)
    await asyncio.wait_for(app(exchange.scope, exchange.receive, blocked), 1)
    assert closed.is_set()


async def test_a_handler_that_forgets_its_deadline_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.http.middleware.SEND_GRACE_S", 0.05)

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    exchange = await asyncio.wait_for(Exchange(body()).over(stack(stuck, timeout=0.05)), 1)
    assert exchange.status == 504


async def test_a_cancelled_call_leaves_no_task() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    call = asyncio.create_task(Exchange(body()).over(stack(slow)))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_fault_of_ours_is_a_500_that_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError(SECRET)

    with caplog.at_level(logging.ERROR):
        exchange = await Exchange(body()).over(stack(broken))
    assert exchange.status == 500
    assert exchange.error["code"] == "internal_error"
    assert SECRET not in caplog.text + exchange.error["message"]
    [record] = caplog.records
    assert "ValueError" in record.message
    assert "in broken" in record.message, "the place is logged"


async def test_an_error_of_the_engine_is_told() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise EngineFailure("the engine failed")

    exchange = await Exchange(body()).over(stack(broken))
    assert exchange.error == {
        "message": "the engine failed",
        "type": "server_error",
        "param": None,
        "code": "engine_failure",
    }


async def test_a_fault_after_the_start_of_the_answer_cuts_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError(SECRET)

    with caplog.at_level(logging.ERROR):
        exchange = await Exchange(body()).over(stack(half))
    assert len(exchange.sent) == 1
    assert len(caplog.records) == 1
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        (b"Bearer k\xc3\xa9y", True),
        (b"BEARER  k\xc3\xa9y ", True),
        (b"Bearer k\xe9y", False),
        (b"Bearer \xff", False),
        (b"Bearer", False),
        (b"Basic k\xc3\xa9y", False),
        (None, False),
    ],
)
async def test_keys_are_compared_as_bytes(given: bytes | None, passes: bool) -> None:
    headers = {} if given is None else {b"authorization": given}
    await assert_passes(headers, passes)


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({b"x-api-key": b"k\xc3\xa9y"}, True),
        ({b"x-api-key": b"k\xc3\xa9y", b"authorization": b"Bearer wrong"}, True),
        ({b"x-api-key": b"wrong", b"authorization": b"Bearer k\xc3\xa9y"}, True),
        ({b"x-api-key": b"wrong"}, False),
        ({b"x-api-key": b""}, False),
        ({b"x-api-key": b"Bearer k\xc3\xa9y"}, False),
    ],
)
async def test_the_key_may_be_in_either_header(headers: dict[bytes, bytes], passes: bool) -> None:
    await assert_passes(headers, passes)


async def assert_passes(headers: dict[bytes, bytes], passes: bool) -> None:
    app = RequestContextMiddleware(ApiKeyMiddleware(echo, key=SecretStr("kéy")), timeout=5.0)
    exchange = await Exchange(body(), headers=headers).over(app)
    assert exchange.status == (200 if passes else 401)


async def test_other_protocols_pass_untouched() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    wrapped = stack(ApiKeyMiddleware(app, key=SecretStr("k")))
    exchange = Exchange()
    exchange.scope = {"type": "lifespan"}
    await exchange.over(wrapped)
    assert seen == ["lifespan"]
