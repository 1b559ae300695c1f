"""The OpenAI-compatible routes, held against the official client and the documented wire format."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support.server import Server

MODEL = "tiny-llama"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def chunks(text: str) -> list[dict[str, Any]]:
    """The chunks of a raw stream, which must end as the API's do."""
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "triptych")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


def test_a_completion_has_every_field_of_the_api(server: Server) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "temperature": 0}
    content = server.post("/v1/completions", body).json()
    [choice] = content.pop("choices")
    assert content.pop("id").startswith("cmpl-")
    assert isinstance(content.pop("created"), int)
    usage = content.pop("usage")
    assert content == {"object": "text_completion", "model": MODEL}
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["logprobs"] is None
    assert usage["completion_tokens"] <= 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_sixteen_tokens_are_the_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="hello", extra_body={"ignore_eos": True, "top_k": 5, "min_tokens": 2}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_a_bias_bans_and_forces_tokens(server: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    ids = server.post("/tokenize", {"prompt": "mat"}).json()["tokens"]
    forced = server.post("/v1/completions", body | {"logit_bias": {str(ids[-1]): 100}})
    text = server.post("/detokenize", {"tokens": [ids[-1]] * 3}).json()["text"]
    assert forced.json()["choices"][0]["text"] == text
    greedy = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert greedy != text
    sampled = body | {"temperature": 2.0, "seed": 1}
    assert server.post("/v1/completions", sampled).json()["choices"][0]["text"] != greedy
    sampled["min_p"] = 1
    assert server.post("/v1/completions", sampled).json()["choices"][0]["text"] == greedy


def test_the_default_is_cut_to_what_fits(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[5] * 8190, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].finish_reason == "length"


def test_prompts_may_be_texts_or_token_ids(server: Server, client: openai.OpenAI) -> None:
    ids = server.post("/tokenize", {"prompt": "hello"}).json()["tokens"]
    prompts: list[Any] = ["hello", ["hello"], ids, [ids]]
    answers = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        for prompt in prompts
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1
    both = client.completions.create(
        model=MODEL, prompt=["hello", "the cat"], max_tokens=5, temperature=0, n=2
    )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == answers[0].choices[0].text
    count = sum(
        server.post("/tokenize", {"prompt": p}).json()["count"] for p in ("hello", "the cat")
    )
    assert both.usage is not None
    assert both.usage.prompt_tokens == count, "each prompt is counted once, whatever n is"


def test_n_answers_have_seeds_in_a_row(client: openai.OpenAI) -> None:
    def texts(n: int, seed: int) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt="hello", max_tokens=12, n=n, seed=seed, temperature=1.5
        )
        return [choice.text for choice in answer.choices]

    three = texts(3, 40)
    assert len(set(three)) == 3
    assert three == [*texts(1, 40), *texts(1, 41), *texts(1, 42)]


def test_temperature_is_one_by_default(client: openai.OpenAI) -> None:
    answers = client.completions.create(model=MODEL, prompt="hello", max_tokens=24, n=4, seed=1)
    assert len({choice.text for choice in answers.choices}) == 4


def test_echo_puts_the_prompt_before_the_text(server: Server, client: openai.OpenAI) -> None:
    ids = server.post("/tokenize", {"prompt": "the cat"}).json()["tokens"]
    plain = client.completions.create(model=MODEL, prompt=ids, max_tokens=4, temperature=0)
    echoed = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=4, temperature=0, echo=True
    )
    assert echoed.choices[0].text == "the cat" + plain.choices[0].text
    stream = client.completions.create(
        model=MODEL, prompt="the cat", max_tokens=4, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == echoed.choices[0].text


def test_completion_logprobs_are_parallel_lists(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=24, temperature=0, logprobs=2
    )
    text, found = answer.choices[0].text, answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    whole = 0
    for token, logprob, top, at in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert 1 <= len(top) <= 3
        assert 0 <= at <= len(text)
        if not token.startswith("bytes:") and token in text:
            assert text[at:].startswith(token)
            whole += 1
    assert whole


def test_a_completion_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": ["hello", "the"], "max_tokens": 8}
    whole = client.completions.create(**body, temperature=0)
    texts = ["", ""]
    reasons: list[str | None] = [None, None]
    for chunk in client.completions.create(**body, temperature=0, stream=True):
        assert chunk.usage is None
        [choice] = chunk.choices
        assert reasons[choice.index] is None, "nothing follows a finish reason"
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_a_chat_answer_has_every_field_of_the_api(server: Server) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    content = server.post("/v1/chat/completions", body).json()
    [choice] = content.pop("choices")
    assert content.pop("id").startswith("chatcmpl-")
    assert content.pop("created") > 0
    assert set(content.pop("usage")) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert content == {"object": "chat.completion", "model": MODEL}
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    message = choice["message"]
    assert set(message) == {"role", "content", "refusal"}
    assert message["role"] == "assistant"


def test_a_chat_stream_is_worded_as_the_api_does(server: Server) -> None:
    body = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
    }
    whole = server.post("/v1/chat/completions", body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.post("/v1/chat/completions", body | options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *middle, last, usage = chunks(answer.text)
    everything = [first, *middle, last, usage]
    assert {chunk["object"] for chunk in everything} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in everything}) == 1
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert all(chunk["usage"] is None for chunk in everything[:-1])
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    without = chunks(server.post("/v1/chat/completions", body | {"stream": True}).text)
    assert not any("usage" in chunk for chunk in without)


def test_chat_logprobs_have_bytes_and_alternatives(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = client.chat.completions.create(**request)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    for token in found.content:
        assert token.bytes is not None
        assert bytes(token.bytes).decode(errors="replace") == token.token
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 2
    streamed = [
        token
        for chunk in client.chat.completions.create(**request, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == found.content


def test_a_conversation_goes_on_with_the_models_own_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=4)
    parts: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        answer.choices[0].message.model_dump(),  # type: ignore[list-item]
        {"role": "user", "content": "and?"},
    ]
    longer = client.chat.completions.create(model=MODEL, messages=parts, max_tokens=4)
    assert longer.usage is not None
    assert answer.usage is not None
    assert longer.usage.prompt_tokens > answer.usage.prompt_tokens


def test_developer_is_system_and_parts_are_lines(server: Server) -> None:
    def prompt_tokens(messages: list[dict[str, Any]]) -> int:
        body = {"messages": messages, "max_tokens": 1}
        found: int = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
        return found

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt_tokens([{"role": "developer", "content": parts}]) == prompt_tokens(
        [{"role": "system", "content": "a\nb"}]
    )


def test_neutral_values_of_unsupported_fields_are_fine(server: Server) -> None:
    body = {
        "messages": MESSAGES,
        "max_tokens": 2,
        "n": None,
        "stop": None,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "store": False,
        "metadata": {"a": "b"},
        "user": "me",
        "presence_penalty": None,
        "stream_options": None,
    }
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text


async def test_many_at_once_through_the_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def ask(number: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"hello {number % 4}"}],
                max_tokens=10,
                temperature=0,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers = await asyncio.gather(*[ask(number) for number in range(24)])
    assert all(answers[number] == answers[number % 4] for number in range(24))
