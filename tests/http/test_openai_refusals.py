"""What the OpenAI-compatible routes refuse, and in which words."""

from __future__ import annotations

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support.server import Server

MODEL = "tiny-llama"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"999999999": 1}),
        ("logit_bias", {"5": 101}),
        ("min_p", 1.5),
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("n", 129),
        ("n", 0),
        ("temperature", 2.1),
        ("top_p", 1.1),
        ("presence_penalty", -3),
        ("max_tokens", 0),
        ("max_completion_tokens", "4"),
        ("top_logprobs", 2),
        ("logprobs", 1),
        ("stop", ["a"] * 17),
        ("stream_options", {"include_usage": True}),
        ("seed", 2**63),
        ("messages", []),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
        ("messages", [{"role": "user", "content": None}]),
        ("no_such_field", 1),
    ],
)
def test_what_is_not_served_is_named(server: Server, field: str, value: object) -> None:
    answer = server.post(
        "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2} | {field: value}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 3),
        ("suffix", "x"),
        ("logprobs", 21),
        ("prompt", []),
        ("prompt", [[1, -1]]),
        ("prompt", ["a", 1]),
        ("prompt", [[1], "a", [2.5]]),
        ("prompt", ["a"] * 129),
        ("prompt", None),
    ],
)
def test_what_completions_do_not_take_is_named(server: Server, field: str, value: object) -> None:
    answer = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 2} | {field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split(".")[0] == field


def test_echo_with_logprobs_and_too_many_sequences_are_refused(server: Server) -> None:
    for extra, param in [({"echo": True, "logprobs": 1}, "echo"), ({"n": 65}, "n")]:
        answer = server.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2} | extra)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_too_long_is_told_in_the_clients_terms(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, extra_body={name: 9000}
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == name
    assert f"{name}: is 9000" in str(caught.value)
    assert "max_new_tokens" not in str(caught.value)


def test_a_conversation_that_is_too_long_is_the_messages(server: Server) -> None:
    messages = [{"role": "user", "content": "xyz " * 9000}]
    answer = server.post("/v1/chat/completions", {"messages": messages})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("echo", [False, True])
def test_bad_token_ids_are_the_prompts(server: Server, echo: bool) -> None:
    answer = server.post("/v1/completions", {"prompt": [5, 10**6], "echo": echo})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_unknown_routes_and_methods_are_told_as_json(server: Server) -> None:
    for method, path, allowed in [
        ("GET", "/v1/completions", "POST"),
        ("GET", "/generate", "POST"),
        ("POST", "/v1/models", "GET"),
        ("POST", "/metrics", "GET"),
        ("POST", "/v1/embeddings", None),
        ("GET", "/v1", None),
        ("GET", "/nope", None),
        ("GET", "/static_content/nope", None),
    ]:
        answer = server.post(path, {}) if method == "POST" else server.get(path)
        assert answer.status_code == (405 if allowed else 404)
        assert allowed is None or allowed in answer.headers["allow"]
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_url")
        assert method in error["message"]
        assert path in error["message"]
        assert answer.headers["x-request-id"]
