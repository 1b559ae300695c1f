"""Errors on the wire: every class has a status, and a message says where and what."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

import pytest
from fastapi.sse import format_sse_event
from msgspec.structs import replace
from pydantic import Field
from starlette.responses import StreamingResponse

from api.http import sse
from api.http.context import RequestContext, enter_request
from api.http.error_formats import OPENAI, TORCHSERVE, ErrorFormat
from api.http.errors import error_body, error_response, status_of
from api.http.schemas import WireModel
from api.native.schemas import GenerateRequest
from api.openai.completions import alternatives, name_of
from api.openai.requests import ChatRequest, CompletionRequest
from api.openai.respond import rename_fields
from runners.contracts import errors
from runners.contracts.errors import EngineFailure, InvalidRequest, Overloaded, TriptychError
from runners.contracts.text import TokenLogprob


def leaves(cls: type[TriptychError]) -> list[type[TriptychError]]:
    below = [leaf for sub in cls.__subclasses__() for leaf in leaves(sub)]
    return below or [cls]


@pytest.mark.parametrize("error_format", [OPENAI, TORCHSERVE], ids=["openai", "torchserve"])
async def test_every_error_a_request_can_meet_has_a_status(error_format: ErrorFormat) -> None:
    enter_request(
        RequestContext(request_id="r", route="other", timeout=1.0, error_format=error_format)
    )
    stopping_the_start = set(leaves(errors.ConfigError))
    for cls in leaves(TriptychError):
        if cls not in stopping_the_start:
            assert status_of(cls("x")) == error_format.statuses[cls], cls


def test_an_overload_says_when_to_come_back() -> None:
    answer = error_response(Overloaded("full", retry_after_s=7))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"


class Inner(WireModel):
    size: Annotated[int, Field(le=5)]


class Outer(WireModel):
    either: str | list[int] = ""
    inner: list[Inner] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (
            b'{"inner": [{"size": 1}, {"size": 6}]}',
            "inner.1.size",
            "inner.1.size: Input should be less than or equal to 5",
        ),
        (
            b'{"either": 1}',
            "either",
            "either: Input should be a valid string or Input should be a valid list",
        ),
        (b'{"either": "", "x": 1}', "x", "x: is not a known field"),
    ],
)
def test_a_refusal_names_field_and_rule(body: bytes, param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Outer.parse(body)
    assert (caught.value.field, caught.value.message) == (param, message)


def test_a_refusal_is_short_and_repeats_no_value() -> None:
    body = json.dumps({"inner": [{"size": f"secret{i}"} for i in range(9)]}).encode()
    with pytest.raises(InvalidRequest) as caught:
        Outer.parse(body)
    assert caught.value.message.endswith("and 5 more")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": [[[]] * 20_000]}, "prompt.0.0: Input should be a valid integer"),
        ({"prompt": [[1] * 1_000_001]}, "List should have at most 1000000 items"),
        ({"prompt": "a"} | {f"x{i}": 1 for i in range(20_000)}, "20000 errors, too many to list"),
    ],
)
def test_a_bad_body_of_any_size_is_refused_shortly(body: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        CompletionRequest.parse(json.dumps(body).encode())
    assert caught.value.message.endswith(message)


def test_of_many_bad_turns_the_first_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest.parse(json.dumps({"messages": [1] * 20_000}).encode())
    assert caught.value.message == "messages.0: Input should be an object"


def test_null_means_the_default() -> None:
    openai = CompletionRequest.parse(b'{"prompt": "a", "min_tokens": null, "ignore_eos": null}')
    sampling = openai.for_runner(max_tokens=None, logprobs=None, model_temperature=None)
    assert (sampling.min_new_tokens, sampling.ignore_eos) == (None, None)
    native = GenerateRequest.parse(b'{"prompt": "a", "min_new_tokens": null, "ignore_eos": null}')
    assert (native.for_runner().min_new_tokens, native.for_runner().ignore_eos) == (None, None)


def test_complaints_name_the_clients_fields() -> None:
    chat = ChatRequest.parse(b'{"messages": [{"role": "user", "content": "x"}]}')
    fields = [("prompt", "messages"), ("max_new_tokens", "max_tokens"), (None, None)]
    for field, client_field in fields:
        with pytest.raises(InvalidRequest) as caught, rename_fields(chat.field_names):
            raise InvalidRequest("is wrong", field=field)
        assert caught.value.field == client_field
        assert caught.value.message == (f"{client_field}: is wrong" if field else "is wrong")


def test_pieces_of_characters_have_names_of_their_own() -> None:
    def token(raw: bytes) -> TokenLogprob:
        text = raw.decode(errors="replace")
        return TokenLogprob(token_id=1, token=text, token_bytes=raw, logprob=-1.0)

    half, other, replacement = token(b"\xe2\x80"), token(b"\xe2"), token("\ufffd".encode())
    found = replace(half, top=(half, other, replacement, token(b"a")))
    assert name_of(found) == r"bytes:\xe2\x80"
    assert set(alternatives(found)) == {r"bytes:\xe2\x80", r"bytes:\xe2", "\ufffd", "a"}


def test_prompts_come_in_four_forms() -> None:
    def prompts(value: object) -> object:
        return CompletionRequest.parse(json.dumps({"prompt": value}).encode()).prompts()

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1], [2, 3]]) == [[1], [2, 3]]
    assert prompts(["a", [1]]) == ["a", [1]]


def test_openai_defaults_reach_the_runner() -> None:
    body = ChatRequest.parse(b'{"messages": [{"role": "user", "content": "x"}], "top_k": -1}')

    def temperature(own: float | None) -> float | None:
        sampling = body.for_runner(max_tokens=None, logprobs=None, model_temperature=own)
        assert sampling.top_k == 0
        return sampling.temperature

    assert temperature(None) == 1.0
    assert temperature(0.3) == 0.3


async def frames(*, fail_at: int) -> AsyncIterator[bytes]:
    for number in range(3):
        if number == fail_at:
            raise EngineFailure("broke")
        yield str(number).encode()


async def test_an_error_before_the_first_frame_is_raised() -> None:
    with pytest.raises(EngineFailure):
        await sse.stream_response(frames(fail_at=0), error_event=None)


@pytest.mark.parametrize("event", [None, "error"])
async def test_an_error_after_it_is_the_last_frame(event: str | None) -> None:
    enter_request(RequestContext(request_id="r", route="other", timeout=1.0))
    response = await sse.stream_response(frames(fail_at=2), error_event=event)
    assert isinstance(response, StreamingResponse)
    *before, last = [bytes(frame) async for frame in response.body_iterator]  # type: ignore[arg-type]
    assert before == [b"0", b"1"]
    assert last == format_sse_event(data_str=error_body(EngineFailure("broke")), event=event)
    assert last.startswith(b"event: error\ndata: {" if event else b"data: {")
