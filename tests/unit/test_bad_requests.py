"""Whatever a client sends, it gets a 4xx that says what is wrong.

The whole service answers, with its middlewares, in this process; only the runner is a fake.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from _bentoml_impl.tasks import Sqlite3Store  # type: ignore[import-untyped]
from starlette.testclient import TestClient

from runners.contracts.runner import RunnerHealth, RunnerState
from tests.support.bad_bodies import BAD_BODIES, TEXT_ROUTES
from tests.support.fake_runner import FakeTextRunner


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of the service, which has started."""
    with pytest.MonkeyPatch.context() as patch:
        # What importing the service sets if it is not set yet.
        patch.setenv("BENTOML_DISABLE_GPU_ALLOCATION", "1")
        jobs = str(tmp_path_factory.mktemp("jobs") / "results.db")
        patch.setenv("BENTOML_RESULT_STORE", jobs)
        Sqlite3Store.init_db(jobs)
        service: Any = importlib.import_module("service")
        runners = service.Runners(text=FakeTextRunner())
        patch.setattr(service, "chosen_runners", lambda *_: runners)
        patch.setattr(service.settings, "model_aliases", ("gpt-*", "tgi"))
        with TestClient(service.Triptych.to_asgi()) as made:
            yield made


@pytest.mark.parametrize("route", TEXT_ROUTES)
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies_are_the_clients_fault(client: TestClient, route: str, body: bytes) -> None:
    answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize("route", TEXT_ROUTES)
@pytest.mark.parametrize(
    "content_type",
    ["application/vnd.bentoml+pickle", "multipart/form-data; boundary=x", "text/plain", "x"],
)
def test_only_json_is_taken(client: TestClient, route: str, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    answer = client.post(route, content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Content-Type"


@pytest.mark.parametrize("headers", [{"Content-Type": "application/json; charset=utf-8"}, {}])
def test_json_may_name_its_charset_or_nothing_at_all(
    client: TestClient, headers: dict[str, str]
) -> None:
    answer = client.post("/tokenize", content=b'{"prompt": "hello"}', headers=headers)
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
        ({"prompt": "a", "min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"prompt": "a", "min_p": -0.1}, "min_p", "greater than or equal to 0"),
        ({"prompt": "a", "logit_bias": [5]}, "logit_bias", "valid dictionary"),
        ({"prompt": "a", "logit_bias": {"5": 100.5}}, "logit_bias.5", "less than or equal to 100"),
        ({"prompt": "a", "logit_bias": {"5": -101}}, "logit_bias.5", "greater than or equal to"),
        ({"prompt": "a", "logit_bias": {"5": "1"}}, "logit_bias.5", "valid number"),
        ({"prompt": "a", "logit_bias": {"5": None}}, "logit_bias.5", "valid number"),
        ({"prompt": "a", "logit_bias": {"-5": 1}}, "logit_bias.-5", "a token id"),
        ({"prompt": "a", "logit_bias": {"05": 1}}, "logit_bias.05", "a token id"),
        ({"prompt": "a", "logit_bias": {"": 1}}, "logit_bias.", "a token id"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x", "a token id"),
        (
            {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(301)), 1)},
            "logit_bias",
            "300",
        ),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos", "valid boolean"),
        ({"prompt": "a", "prompts": ["b"]}, "prompt", "either prompt or prompts"),
        ({"prompts": []}, "prompts", "at least 1"),
        ({"prompts": ["a"] * 129}, "prompts", "at most 128"),
        ({"prompt": "a", "frobnicate": 1}, "frobnicate", "not a known field"),
    ],
)
def test_the_field_and_what_it_may_hold_are_named(
    client: TestClient, body: dict[str, object], param: str, said: str
) -> None:
    answer = client.post("/generate", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]
    assert said in error["message"]


def test_each_answer_has_a_request_id(client: TestClient) -> None:
    given = client.get("/livez", headers={"X-Request-ID": "a-b_c.1"})
    assert given.headers["x-request-id"] == "a-b_c.1"
    for bad in ("a b", "x" * 129, 'a"b', ""):
        answer = client.get("/livez", headers={"X-Request-ID": bad})
        assert answer.headers["x-request-id"] not in ("", bad)
    ids = {client.post("/generate", json={}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    body = {"prompt": "a", "max_new_tokens": 1}
    answer = client.post("/generate", json=body, headers={"X-Request-ID": "mine"})
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("stop_token_ids", [None, []], [5]),
        ("use_beam_search", [None, False], True),
        ("suffix", [None, ""], "x"),
        ("length_penalty", [None, 1, 1.0], 0.5),
        ("skip_special_tokens", [None, True], False),
        ("include_stop_str_in_output", [None, False], True),
        ("bad_words", [None, []], ["a"]),
        ("priority", [None, 0], 1),
    ],
)
def test_a_field_that_is_not_supported_may_have_its_neutral_value(
    client: TestClient, field: str, neutral: list[Any], other: Any
) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for value in neutral:
        answer = client.post("/v1/completions", json={**body, field: value})
        assert answer.status_code == 200, answer.text
    refused = client.post("/v1/completions", json={**body, field: other})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    "field",
    [
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"n": 1},
        {"logit_bias": {}},
        {"store": False},
        {"service_tier": "auto"},
        {"verbosity": "medium"},
        {"top_logprobs": 0},
        {"add_generation_prompt": True},
        {"chat_template_kwargs": {}},
    ],
)
def test_what_chat_clients_send_without_a_wish_has_no_effect(
    client: TestClient, field: dict[str, Any]
) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, **field}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.json()["error"]["message"] == "the model has no chat template"


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/livez", "/ping", "/docs.json"])
def test_what_takes_get_takes_head_and_a_slash_at_the_end(client: TestClient, path: str) -> None:
    assert client.get(path + "/").status_code == 200
    assert client.head(path).status_code == 200
    assert client.head("/generate").status_code == 405


def test_health_is_that_of_the_models(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    health = RunnerHealth(state=RunnerState.LOADING, detail="importing the engine")
    monkeypatch.setattr(FakeTextRunner, "health", lambda _: health)
    for path in ("/health", "/readyz"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert "importing the engine" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "5"
    assert client.get("/livez").status_code == 200


def test_clients_may_call_the_model_by_its_aliases(client: TestClient) -> None:
    [served] = client.get("/v1/models").json()["data"]
    for name, status in [("gpt-4o", 200), ("tgi", 200), ("tgi-2", 404), (served["id"], 200)]:
        body = {"prompt": "a", "max_tokens": 1, "model": name}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == status
        assert client.get(f"/v1/models/{name}").status_code == status
        if status == 200:
            assert answer.json()["model"] == served["id"]
            assert client.get(f"/v1/models/{name}").json() == served


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/generate_image_task/status", 400),
        ("GET", "/generate_image_task/get?task_id=none", 404),
        ("POST", "/generate_image_task/retry?task_id=none", 404),
        ("GET", "/generate_image_task/submit", 405),
        ("GET", "/nope", 404),
    ],
)
def test_errors_of_bentoml_have_the_shape_of_all_others(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert int(answer.headers["content-length"]) == len(answer.content)


def chunks_of(client: TestClient, options: dict[str, bool]) -> list[dict[str, Any]]:
    body = {"prompt": "hello", "max_tokens": 3, "stream": True, "stream_options": options}
    lines = client.post("/v1/completions", json=body).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_each_chunk_has_the_usage_so_far_if_it_is_wanted(client: TestClient) -> None:
    for with_last in (True, False):
        options = {"continuous_usage_stats": True, "include_usage": with_last}
        chunks = chunks_of(client, options)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"]]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert any(not chunk["choices"] for chunk in chunks) == with_last
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {
            chunks[0]["usage"]["prompt_tokens"]
        }
    assert all("usage" not in chunk for chunk in chunks_of(client, {}))
