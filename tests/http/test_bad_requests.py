"""Whatever a client sends, it gets a 4xx that says what is wrong, and the log stays clean."""

from __future__ import annotations

import httpx
import pytest

from tests.support.server import Server

SECRET = "swordfish-4711"
ROUTES = ["/generate", "/generate_stream", "/tokenize", "/v1/completions", "/v1/chat/completions"]

BODIES = {
    "malformed": b'{"prompt": "' + SECRET.encode(),
    "a list": b'["' + SECRET.encode() + b'"]',
    "a string": b'"' + SECRET.encode() + b'"',
    "null": b"null",
    "empty": b"",
    "blank": b"  ",
    "wrong type": b'{"prompt": {"a": "' + SECRET.encode() + b'"}, "messages": 1}',
    "unknown field": b'{"' + SECRET.encode() + b'": 1}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe ' + SECRET.encode() + b'"}',
    "lone surrogate": b'{"prompt": "' + SECRET.encode() + b' \\ud800"}',
    "NaN": b'{"temperature": NaN, "prompt": "' + SECRET.encode() + b'"}',
    "Infinity": b'{"temperature": -Infinity}',
    "huge integer": b'{"seed": ' + b"9" * 5000 + b"}",
    "big integer": b'{"seed": ' + b"9" * 40 + b"}",
    "deep nesting": b"[" * 100_000,
    "pickle": b"\x80\x04\x95",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_bad_bodies_are_the_clients_fault(server: Server, route: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + route, content=body, headers=headers, timeout=30)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "content_type",
    ["application/vnd.bentoml+pickle", "multipart/form-data; boundary=x", "text/plain", "x"],
)
def test_only_json_is_taken(server: Server, route: str, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    answer = httpx.post(server.url + route, content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Content-Type"


def test_json_may_name_its_charset_or_nothing_at_all(server: Server) -> None:
    body = b'{"prompt": "hello"}'
    for headers in ({"Content-Type": "application/json; charset=utf-8"}, {}):
        answer = httpx.post(server.url + "/tokenize", content=body, headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt": "a", "max_new_tokens": "8"}, "max_new_tokens", "valid integer"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "max_new_tokens": 10**6 + 1}, "max_new_tokens", "1000000"),
        ({"prompt": "a", "temperature": True}, "temperature", "valid number"),
        ({"prompt": "a", "stop": "x" * 257}, "stop.0", "at most 256"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "a", "top_k": 1.5}, "top_k", "valid integer"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos", "valid boolean"),
        ({"prompt": "a", "prompts": ["b"]}, "prompt", "either prompt or prompts"),
        ({"prompts": []}, "prompts", "at least 1"),
        ({"prompts": ["a"] * 129}, "prompts", "at most 128"),
        ({"prompt": "a", "frobnicate": 1}, "frobnicate", "not a known field"),
        ({"prompt": "a", "max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens", "more than"),
    ],
)
def test_the_field_and_what_it_may_hold_are_named(
    server: Server, body: dict[str, object], param: str, said: str
) -> None:
    answer = server.post("/generate", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]
    assert said in error["message"]


def test_token_ids_outside_the_vocabulary_are_refused(server: Server) -> None:
    answer = server.post("/detokenize", {"tokens": [5, 10**6]})
    assert answer.status_code == 400
    assert "vocabulary" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "tokens"
    answer = server.post("/v1/completions", {"prompt": [5, 10**6], "max_tokens": 1})
    assert answer.status_code == 400


def test_each_answer_has_a_request_id(server: Server) -> None:
    given = httpx.get(server.url + "/livez", headers={"X-Request-ID": "a-b_c.1"})
    assert given.headers["x-request-id"] == "a-b_c.1"
    for bad in ("a b", "x" * 129, 'a"b', ""):
        answer = httpx.get(server.url + "/livez", headers={"X-Request-ID": bad})
        assert answer.headers["x-request-id"] not in ("", bad)
    ids = {server.post("/generate", {}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    body = {"prompt": "a", "max_new_tokens": 1}
    answer = server.post("/generate", body, **{"X-Request-ID": "mine"})
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"


def test_two_requests_may_share_a_request_id(server: Server) -> None:
    body = {"prompt": "a", "max_new_tokens": 300, "ignore_eos": True}
    headers = {"X-Request-ID": "shared"}
    with httpx.stream(
        "POST", server.url + "/generate_stream", json=body, headers=headers, timeout=30
    ) as first:
        assert first.status_code == 200
        assert server.post("/generate", {"prompt": "a", "max_new_tokens": 1}, **headers).is_success


def test_the_log_holds_no_prompt_and_no_traceback(server: Server) -> None:
    """Runs last in this file, over all that the tests above made the server write."""
    server.post("/generate", {"prompt": SECRET, "max_new_tokens": 4, "stop": [SECRET]})
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]})
    assert SECRET not in server.log
    server.assert_clean_log()
