"""Answers of any length leave the event loop to other requests, and their length is bounded."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from starlette.responses import Response
from typing_extensions import override

from api.http.admission import Admission
from api.http.context import RequestContext, enter_request
from api.http.json_pieces import BATCH, PIECE_BYTES, encode, json_response
from api.models.streams import FAIR_EVENTS
from api.models.text import TextModel
from api.native import routes
from api.native.schemas import GenerateRequest, StreamRequest
from api.openai.chat import create_chat_completion
from api.openai.completions import create_completion
from api.openai.requests import ChatRequest, CompletionRequest
from runners.contracts.errors import InvalidRequest
from runners.contracts.text import ChatPrompt, Prompt, SamplingParams
from tests.support.fake_runner import FakeTextRunner

Create = Callable[..., Awaitable[Response]]


class ChattingRunner(FakeTextRunner):
    """Takes a conversation too; all tokens are there at once."""

    def __init__(self) -> None:
        super().__init__(at_once=True)

    @override
    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        text = prompt.messages[-1].content if isinstance(prompt, ChatPrompt) else prompt
        return await super().tokenize(text)


@pytest.fixture(autouse=True)
async def context() -> AsyncIterator[RequestContext]:
    """The current request."""
    context = RequestContext(request_id="r", route="other", timeout=60.0)
    enter_request(context)
    yield context
    await context.resources.aclose()


def model(max_logprobs: int = 10**6) -> TextModel:
    return TextModel(ChattingRunner(), Admission(128), max_logprobs=max_logprobs)


async def generate(text: TextModel, **fields: Any) -> Response:
    answer = await routes.generate(text, GenerateRequest.checked(fields))
    return json_response(answer, omit_null=True)


async def stream(text: TextModel, **fields: Any) -> Response:
    return await routes.generate_stream(text, StreamRequest.checked(fields))


async def complete(text: TextModel, **fields: Any) -> Response:
    return await create_completion(text, CompletionRequest.checked(fields))


async def chat(text: TextModel, **fields: Any) -> Response:
    messages = [{"role": "user", "content": "hello"}]
    return await create_chat_completion(text, ChatRequest.checked({"messages": messages, **fields}))


async def sent(response: Response, count: Callable[[int], None] = lambda _: None) -> bytes:
    """The body that a response sends; `count` is called with the length of each piece."""
    body = bytearray()

    async def send(message: Any) -> None:
        piece = message.get("body", b"")
        count(len(piece))
        body.extend(piece)

    async def receive() -> Any:
        await asyncio.Event().wait()

    await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    return bytes(body)


class Turns:
    """Counts the work that is done between two turns of another task."""

    def __init__(self) -> None:
        self._turn = 0
        self._work = Counter[int]()

    def count(self, work: int = 1) -> None:
        self._work[self._turn] += work

    @property
    def longest(self) -> int:
        return max(self._work.values())

    @property
    def total(self) -> int:
        return self._work.total()

    async def take(self) -> None:
        while True:
            await asyncio.sleep(0)
            self._turn += 1


@contextmanager
def turns() -> Iterator[Turns]:
    counted = Turns()
    task = asyncio.ensure_future(counted.take())
    try:
        yield counted
    finally:
        task.cancel()


class Inner(BaseModel):
    a: int | None = None
    b: list[float] = []


class Outer(BaseModel):
    none: None = None
    text: str = 'quotes " and \\ and é'
    inner: Inner = Inner()
    inners: list[Inner] = [Inner(a=1, b=[0.1, 1e-7, -2.0]), Inner()]
    table: dict[str, list[int]] = {"x": [1], "": []}
    empty: list[Inner] = []


@pytest.mark.parametrize("omit_null", [False, True])
async def test_json_is_what_pydantic_writes(omit_null: bool) -> None:
    for value in (Outer(), Inner(), Outer(inners=[Inner(b=[float(i)] * 300) for i in range(900)])):
        expected = json.loads(value.model_dump_json(exclude_none=omit_null))
        assert json.loads(encode(value, omit_null=omit_null)) == expected
        assert json.loads(await sent(json_response(value, omit_null=omit_null))) == expected


async def test_what_json_lacks_is_null_as_in_pydantic() -> None:
    value = Inner(b=[math.inf, -math.inf, math.nan])
    assert json.loads(encode(value)) == json.loads(value.model_dump_json())


async def test_bytes_are_base64_across_pieces() -> None:
    class File(BaseModel):
        content: bytes

    content = bytes(range(256)) * 2000
    response = json_response(File(content=content))
    assert msgspec.json.decode(await sent(response), type=dict[str, bytes]) == {"content": content}


async def test_a_short_answer_has_its_length() -> None:
    assert json_response(Inner()).headers["content-length"] == "17"


@pytest.mark.parametrize(
    "value",
    [list(range(300_000)), [msgspec.Raw(b"[" + b"1," * 900 + b"1]")] * 2000, b"x" * 2_000_000],
    ids=["integers", "encoded", "bytes"],
)
async def test_others_are_served_between_pieces_of_a_long_answer(value: Any) -> None:
    with turns() as work:
        body = await sent(json_response(value), work.count)
    assert work.total == len(body) > 1_000_000
    assert work.longest < 2 * (PIECE_BYTES + BATCH * 2000)


@pytest.mark.parametrize("n", [1, 5])
async def test_others_are_served_while_tokens_are_collected(n: int) -> None:
    sampling = SamplingParams(max_new_tokens=2000, logprobs=3)
    with turns() as work:
        outputs = await (await model().generate(["hello"], sampling, n=n)).collect(
            lambda _: work.count()
        )
    assert work.total == sum(len(output.logprobs or []) for output in outputs) == n * 2000
    assert work.longest <= 2 * FAIR_EVENTS


@pytest.mark.parametrize(
    ("create", "fields"),
    [
        (stream, {"prompt": "a", "max_new_tokens": 2000, "logprobs": 5}),
        (complete, {"prompt": "a", "max_tokens": 2000, "logprobs": 5, "n": 3}),
        (chat, {"max_tokens": 2000, "logprobs": True, "top_logprobs": 5, "n": 3}),
    ],
)
async def test_others_are_served_while_a_stream_catches_up(
    create: Create, fields: dict[str, Any]
) -> None:
    streaming = {} if create is stream else {"stream": True}
    with turns() as work:
        response = await create(model(), **fields, **streaming)
        await sent(response, lambda length: work.count(length > 0))
    assert work.total >= fields.get("n", 1) * 2000
    assert work.longest <= 2 * FAIR_EVENTS


@pytest.mark.parametrize(
    ("create", "fields", "alternatives", "tokens"),
    [
        (generate, {"prompts": ["a"] * 5}, {"logprobs": 3}, "max_new_tokens"),
        (stream, {"prompt": "a"}, {"logprobs": 19}, "max_new_tokens"),
        (complete, {"prompt": ["a"], "n": 5}, {"logprobs": 3}, "max_tokens"),
        (complete, {"prompt": ["a"] * 5, "stream": True}, {"logprobs": 3}, "max_tokens"),
        (chat, {"n": 5}, {"logprobs": True, "top_logprobs": 3}, "max_tokens"),
        (chat, {"n": 20, "stream": True}, {"logprobs": True}, "max_completion_tokens"),
    ],
)
async def test_a_request_may_ask_for_so_many_logprobs(
    create: Create,
    fields: dict[str, Any],
    alternatives: dict[str, Any],
    tokens: str,
    context: RequestContext,
) -> None:
    text = model(max_logprobs=20_000)
    response = await create(text, **fields, **alternatives, **{tokens: 1000})
    assert b"logprob" in await sent(response)
    await create(text, **fields, **{tokens: 1001})
    await context.resources.aclose()
    with pytest.raises(InvalidRequest) as caught:
        await create(text, **fields, **alternatives, **{tokens: 1001})
    assert caught.value.field == tokens
    for number in ("1001", "20020", "20000"):
        assert number in caught.value.reason
    await context.resources.aclose()
    assert not text.runner.health().running, "the refused sequences are aborted"


async def test_a_request_without_a_token_limit_is_bounded_by_the_rank_s() -> None:
    text = model(max_logprobs=100)
    await sent(await chat(text, logprobs=True, top_logprobs=5))
    with pytest.raises(InvalidRequest, match="16 tokens"):
        await chat(text, logprobs=True, top_logprobs=6)
