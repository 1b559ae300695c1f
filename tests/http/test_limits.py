"""The house rules: API key, body size, admission, deadlines, and clients that leave."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.processes import wait_until
from tests.support.server import HTTP, Server

KEY = "geheim-0815"
AUTH = {"Authorization": f"Bearer {KEY}"}
ORIGIN = "https://page.example"
MAX_QUEUE = 4
MAX_BODY = 4096
TIMEOUT = 3.0
ENDLESS = {"max_new_tokens": 8000, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}
LONG_PREDICTION = json.dumps({"data": "hello", **ENDLESS})
LONG_JOBS = [
    ("/generate", {"prompt": "hello", **ENDLESS}),
    ("/generate", {"prompts": ["hello", "cat"], **ENDLESS}),
    ("/generate_stream", {"prompt": "hello", **ENDLESS}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 8000, "ignore_eos": True, "n": 2}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 8000}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 8000, "stream": True, "n": 2}),
]


class LimitedServer(Server):
    """A server with tight limits that asks for a key, which its own requests carry."""

    def get(self, path: str) -> httpx.Response:
        return HTTP.get(self.url + path, headers=AUTH, timeout=30)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return HTTP.post(self.url + path, json=body, headers=AUTH, timeout=30)


@pytest.fixture(scope="module")
def limited(text_model: Path, bentoml_home: Path) -> Iterator[LimitedServer]:
    variables = {
        "TRIPTYCH_TEXT_MODEL": str(text_model),
        "TRIPTYCH_API_KEY": f"{KEY}\n",  # as a secret file ends
        "TRIPTYCH_MAX_QEUE": "1",
        "TRIPTYCH_MAX_QUEUE": str(MAX_QUEUE),
        "TRIPTYCH_MAX_BODY_BYTES": str(MAX_BODY),
        "TRIPTYCH_REQUEST_TIMEOUT": str(TIMEOUT),
        "BENTOML_CONFIG_OPTIONS": (
            "api_server.http.cors.enabled=true "
            f"api_server.http.cors.access_control_allow_origins=['{ORIGIN}'] "
            "api_server.http.cors.access_control_allow_methods=['GET','POST']"
        ),
    }
    with LimitedServer(bentoml_home, variables) as running:
        yield running  # type: ignore[misc]
        assert KEY not in running.log


@pytest.fixture(autouse=True)
def _empty_house(limited: LimitedServer) -> Iterator[None]:
    """Whatever a test did, the house is empty again soon afterwards."""
    yield
    wait_until(lambda: limited.gauge("admitted_sequences") == 0, 2, "all permits are back")
    wait_until(lambda: limited.gauge("running_sequences") == 0, 5, "nothing is generated")


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/models", "/metrics", "/docs.json", "/", "/nope"]
)
@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"]
)
def test_without_the_key_there_is_nothing(
    limited: LimitedServer, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = HTTP.request(
        "POST" if path == "/generate" else "GET", limited.url + path, headers=headers
    )
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


def test_a_misspelt_variable_is_told_once(limited: LimitedServer) -> None:
    assert limited.log.count("TRIPTYCH_MAX_QEUE (did you mean TRIPTYCH_MAX_QUEUE?)") == 1


def test_probes_and_preflights_need_no_key(limited: LimitedServer) -> None:
    for path in ("/livez", "/readyz", "/healthz", "/ping"):
        assert HTTP.get(limited.url + path).status_code == 200
    assert HTTP.options(limited.url + "/generate").status_code != 401


def test_with_the_key_everything_works(limited: LimitedServer) -> None:
    assert limited.get("/docs.json").status_code == 200
    assert limited.post("/generate", {"prompt": "a", "max_new_tokens": 1}).status_code == 200
    lower = {"Authorization": f"bearer {KEY}"}
    assert HTTP.get(limited.url + "/v1/models", headers=lower).status_code == 200


def test_the_openai_client_sees_authentication_errors(limited: LimitedServer) -> None:
    with (
        openai.OpenAI(base_url=f"{limited.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def request_head(*lines: str) -> bytes:
    head = ["POST /generate HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *lines]
    return "\r\n".join([*head, "", ""]).encode()


def first_line(connection: socket.socket) -> bytes:
    connection.settimeout(5)
    return connection.recv(4096).partition(b"\r\n")[0]


def test_headers_are_bounded_before_the_key_is_looked_at(limited: LimitedServer) -> None:
    for header in (b"X-A: " + b"a" * 600_000, b"X-A: a\r\n" * 200):
        with socket.create_connection(("127.0.0.1", limited.port)) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
            assert b"431" in first_line(connection)


def test_no_path_writes_into_the_log_or_makes_a_metric(limited: LimitedServer) -> None:
    with socket.create_connection(("127.0.0.1", limited.port)) as connection:
        connection.sendall(b"GET /x%0AFORGED%1B[31m HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"400" in first_line(connection)
    assert limited.get("/unheard-of").status_code == 404
    assert "FORGED" not in limited.log
    assert "path=/unheard-of," in limited.log
    metrics = limited.metrics()
    assert "unheard-of" not in metrics
    assert re.search(r'^bentoml_service_request_total\{endpoint="other".*404', metrics, re.M)


def test_without_the_key_no_body_is_read(limited: LimitedServer) -> None:
    for line in ("POST /generate", "POST /livez", "OPTIONS /generate"):
        with socket.create_connection(("127.0.0.1", limited.port)) as connection:
            head = f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n"
            connection.sendall(head.encode() + b" " * 2000)
            assert first_line(connection).split()[1] in (b"401", b"405")


def test_pages_of_an_allowed_origin_can_read_every_error(limited: LimitedServer) -> None:
    headers = {"Origin": ORIGIN}
    too_large = b" " * (MAX_BODY + 1)
    for answer, status in [
        (HTTP.get(limited.url + "/v1/models", headers=headers), 401),
        (HTTP.get(limited.url + "/nope", headers=headers | AUTH), 404),
        (HTTP.get(limited.url + "/generate", headers=headers | AUTH), 405),
        (HTTP.post(limited.url + "/generate", content=too_large, headers=headers | AUTH), 413),
        (HTTP.get(limited.url + "/v1/models", headers=headers | AUTH), 200),
    ]:
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    preflight = headers | {"Access-Control-Request-Method": "POST"}
    assert HTTP.options(limited.url + "/generate", headers=preflight).status_code == 200
    other = HTTP.get(limited.url + "/livez", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_large_body_is_refused(limited: LimitedServer) -> None:
    fits = json.dumps({"prompt": "", "model": "none"}).encode()
    for size, status in [(MAX_BODY, 404), (MAX_BODY + 1, 413)]:
        body = fits[:-1] + b" " * (size - len(fits)) + b"}"
        headers = {**AUTH, "Content-Type": "application/json"}
        answer = HTTP.post(limited.url + "/generate", content=body, headers=headers)
        assert answer.status_code == status
    assert answer.json()["error"]["code"] == "payload_too_large"
    assert str(MAX_BODY) in answer.json()["error"]["message"]


def test_an_announced_large_body_is_not_waited_for(limited: LimitedServer) -> None:
    with socket.create_connection(("127.0.0.1", limited.port)) as connection:
        connection.sendall(request_head("Content-Length: 10000000000"))
        assert b"413" in first_line(connection)


def test_a_chunked_large_body_is_cut_off(limited: LimitedServer) -> None:
    with socket.create_connection(("127.0.0.1", limited.port)) as connection:
        connection.sendall(request_head("Transfer-Encoding: chunked"))
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        for _ in range(5):
            connection.sendall(chunk)
        assert b"413" in first_line(connection)


def test_a_body_that_never_ends_meets_the_deadline(limited: LimitedServer) -> None:
    with socket.create_connection(("127.0.0.1", limited.port)) as connection:
        connection.sendall(request_head("Content-Length: 100") + b"{")
        connection.settimeout(TIMEOUT + 3)
        assert b"504" in connection.recv(4096)


def test_torchserves_clients_are_told_in_their_words(
    limited: LimitedServer, text_model: Path
) -> None:
    url = f"{limited.url}/predictions/{text_model.name}"
    for headers, content, status, kind in [
        ({}, "hello", 401, "InvalidKeyException"),
        (AUTH, "x" * (MAX_BODY + 1), 413, "BadRequestException"),
        (AUTH | {"Content-Type": "application/json"}, LONG_PREDICTION, 504, "RequestTimeoutEx"),
    ]:
        answer = HTTP.post(url, content=content, headers=headers, timeout=30)
        told = answer.json()
        assert (answer.status_code, told["code"]) == (status, status)
        assert told["type"].startswith(kind)
        assert told["message"]


def test_a_full_house_says_when_to_come_back(limited: LimitedServer) -> None:
    body = {"prompt": "hello", **ENDLESS}
    with ExitStack() as stack, httpx.Client(headers=AUTH, timeout=30) as client:
        for _ in range(MAX_QUEUE):
            stream = client.stream("POST", limited.url + "/generate_stream", json=body)
            assert stack.enter_context(stream).status_code == 200
        assert limited.gauge("admitted_sequences") == MAX_QUEUE
        for route, short in [
            ("/generate", {"prompt": "a"}),
            ("/generate_stream", {"prompt": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", CHAT | {"stream": True}),
        ]:
            answer = limited.post(route, short)
            assert answer.status_code == 429, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        answer = limited.post("/predictions/tiny-llama", {"data": "a"})
        assert (answer.status_code, answer.json()["code"]) == (503, 503), "as TorchServe has it"
        assert int(answer.headers["retry-after"]) >= 1
    wait_until(
        lambda: limited.post("/generate", {"prompt": "a", "max_new_tokens": 1}).is_success,
        2,
        "room again once the streams are left",
    )


def test_more_than_the_house_holds_is_never_admitted(limited: LimitedServer) -> None:
    answer = limited.post("/generate", {"prompts": ["a"] * (MAX_QUEUE + 1)})
    assert answer.status_code == 400
    body = {"prompts": ["a"] * MAX_QUEUE, "max_new_tokens": 1}
    assert limited.post("/generate", body).status_code == 200


@pytest.mark.parametrize(("route", "body"), [LONG_JOBS[1], LONG_JOBS[5]])
def test_a_unary_request_meets_its_deadline(
    limited: LimitedServer, route: str, body: dict[str, Any]
) -> None:
    started = time.monotonic()
    answer = limited.post(route, body)
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert TIMEOUT - 0.5 < time.monotonic() - started < TIMEOUT + 2


def test_a_stream_that_meets_its_deadline_says_so(limited: LimitedServer) -> None:
    native = limited.post("/generate_stream", {"prompt": "hello", **ENDLESS})
    assert native.status_code == 200
    frames = native.text.split("\n\n")
    assert frames[0].startswith("data: ")
    event, data = frames[-2].split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    with (
        openai.OpenAI(base_url=f"{limited.url}/v1", api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.APIError, match="exceeded its time limit of 3 s"),
    ):
        for _ in client.completions.create(
            model="tiny-llama",
            prompt="hello",
            max_tokens=8000,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            pass


def aborted(limited: LimitedServer) -> float:
    pattern = r'^triptych_sequences_total\{finish_reason="aborted",.*\} (\S+)$'
    return sum(float(value) for value in re.findall(pattern, limited.metrics(), re.M))


@pytest.mark.parametrize(("route", "body"), LONG_JOBS)
def test_a_client_that_leaves_frees_its_place_at_once(
    limited: LimitedServer, route: str, body: dict[str, Any]
) -> None:
    before = aborted(limited)
    sequences = body.get("n", len(body.get("prompts", "x")))
    with (
        httpx.Client(headers=AUTH, timeout=30) as client,
        pytest.raises(httpx.ReadTimeout),
        client.stream("POST", limited.url + route, json=body, timeout=0.7) as answer,
    ):
        # A stream flows until we have seen enough; a unary answer does not come at all.
        started = time.monotonic()
        for _ in answer.iter_raw():
            if time.monotonic() - started > 0.3:
                raise httpx.ReadTimeout("seen enough")
    wait_until(lambda: limited.gauge("admitted_sequences") == 0, 0.5, "the permits are back")
    assert aborted(limited) == before + sequences
    wait_until(lambda: limited.gauge("running_sequences") == 0, 3, "the engine stopped")
