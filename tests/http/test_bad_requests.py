"""What only a real model, a real socket or the server's log can show of bad requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import LOOPING
from tests.support.bad_bodies import BAD_BODIES, SECRET, TEXT_ROUTES
from tests.support.server import HTTP, Server


def test_token_ids_outside_the_vocabulary_are_refused(server: Server) -> None:
    answer = server.post("/detokenize", {"tokens": [5, 10**6]})
    assert answer.status_code == 400
    assert "vocabulary" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "tokens"
    answer = server.post("/v1/completions", {"prompt": [5, 10**6], "max_tokens": 1})
    assert answer.status_code == 400


def test_a_limit_that_the_rank_checks_is_named(server: Server) -> None:
    answer = server.post("/generate", {"prompt": "a", "max_new_tokens": 3, "min_new_tokens": 4})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "min_new_tokens"
    assert "min_new_tokens" in error["message"]
    assert "more than" in error["message"]


def test_a_template_that_loops_fails_its_own_requests_only(server: Server) -> None:
    loops = {"messages": [{"role": "user", "content": LOOPING}]}
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    generate = {"prompt": "hello", "max_new_tokens": 2}
    before = server.post("/generate", generate).json()["outputs"]
    with ThreadPoolExecutor() as threads:
        routes = ["/v1/chat/completions", "/tokenize"]
        looping = [threads.submit(server.post, route, loops) for route in routes]
        meanwhile = [threads.submit(server.post, "/generate", generate) for _ in range(3)]
    for job in looping:
        answer = job.result()
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "messages"
        assert "chat template exceeded 2 s of CPU time" in answer.json()["error"]["message"]
    for job in meanwhile:
        assert job.result().json()["outputs"] == before
    assert server.post("/v1/chat/completions", chat).status_code == 200
    assert server.readiness()[0] == 200


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate", {"prompt": "a b " * 10**6}),
        ("/tokenize", {"prompt": "a b " * 10**6}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a b " * 10**6}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b " * 10**6}]}),
    ],
    ids=["generate", "tokenize a text", "tokenize a chat", "chat"],
)
def test_what_cannot_fit_is_refused_as_a_text(
    server: Server, route: str, body: dict[str, object]
) -> None:
    answer = server.post(route, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "characters, more than the 8192 tokens" in answer.json()["error"]["message"]


def test_two_requests_may_share_a_request_id(server: Server) -> None:
    body = {"prompt": "a", "max_new_tokens": 300, "ignore_eos": True}
    headers = {"X-Request-ID": "shared"}
    with HTTP.stream(
        "POST", server.url + "/generate_stream", json=body, headers=headers, timeout=30
    ) as first:
        assert first.status_code == 200
        assert server.post("/generate", {"prompt": "a", "max_new_tokens": 1}, **headers).is_success


def test_the_log_holds_no_prompt_and_no_traceback(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
        for route in TEXT_ROUTES:
            for body in BAD_BODIES.values():
                assert client.post(route, content=body).status_code == 400
            answer = client.post(route, content=SECRET, headers={"Content-Type": "text/plain"})
            assert answer.status_code == 400
    server.post("/generate", {"prompt": SECRET, "max_new_tokens": 4, "stop": [SECRET]})
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]})
    assert SECRET not in server.log
    server.assert_clean_log()
