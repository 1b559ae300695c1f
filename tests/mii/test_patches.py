"""MII's bugs, each shown in stock MII and fixed by the patches, over the same engine."""

from __future__ import annotations

import contextlib
import json
import stat
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import transformers as tf
import zmq
from mii.batching import ragged_batching

from runners.contracts.errors import ConfigError, EngineUnavailable
from runners.engines.mii.deployment.ports import free_port
from runners.engines.mii.deployment.registry import private_cache
from runners.engines.mii.patches.apply import ORIGINALS
from runners.engines.mii.patches.sockets import LoopbackContext
from runners.engines.mii.patches.source_check import check_source
from runners.text.paging.blocks import BLOCK_SIZE
from tests.support import mii as support
from tests.support.mii import served
from tests.support.models import greedy, write_model
from tests.support.processes import wait_until

PATCHED_AND_STOCK = pytest.mark.parametrize(
    "stock", [False, pytest.param(True, marks=pytest.mark.xfail(strict=True, raises=Exception))]
)
# Most of this kills the scheduler's thread of stock MII.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True}
PROMPTS = ["hello", "the cat sat on", "a long prompt of several steps, " * 3, "x", "mat 12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock MII hangs: a call that hangs fails sooner."""
    monkeypatch.setattr(support, "TIMEOUT", 10.0)


def texts(folder: Path, prompts: list[str], count: int) -> list[str]:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokens = greedy(folder, prompts, count)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in tokens]


@PATCHED_AND_STOCK
def test_pipelines_of_one_rank_need_no_port_each(
    stock: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[zmq.Context[Any]] = []

    def make_context() -> zmq.Context[Any]:
        contexts.append(LoopbackContext())
        return contexts[-1]

    monkeypatch.setattr(ragged_batching.zmq, "Context", make_context)
    with (
        contextlib.ExitStack() as cleanup,
        zmq.Context() as context,
        context.socket(zmq.PUB) as another,
    ):
        # Stock MII leaves its context open when it cannot bind.
        cleanup.callback(lambda: contexts[-1].destroy(linger=0))
        another.bind(f"tcp://127.0.0.1:{(port := free_port())}")
        with served(model, stock=stock, zmq_port=port) as client:
            assert client.ask("hello", max_new_tokens=2, **GREEDY)[0].response


@PATCHED_AND_STOCK
def test_requests_of_all_kinds_run_together(stock: bool, model: Path) -> None:
    kinds: list[dict[str, Any]] = [
        GREEDY,
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_k": 5},
        GREEDY,
        {"top_p": 0.5, "temperature": 1.5},
    ]
    with served(model, stock=stock) as client:
        calls = [
            lambda kind=kind, prompt=prompt: client.ask(prompt, max_new_tokens=24, **kind)[0]
            for kind in kinds
            for prompt in ("hello", "the cat")
        ]
        answers = client.together(*calls)
    want = texts(model, ["hello", "the cat"], 24)
    assert [answers[i].response for i in (0, 1, 8, 9)] == want * 2


@PATCHED_AND_STOCK
def test_a_failing_step_fails_its_requests_and_no_others(
    stock: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(model, stock=stock) as client:
        engine = client.pipeline.inference_engine
        put = engine.put
        failed: list[bool] = []

        def fails_once(*args: Any, **kwargs: Any) -> Any:
            if not failed:
                failed.append(True)
                raise ArithmeticError("this step fails")
            return put(*args, **kwargs)

        monkeypatch.setattr(engine, "put", fails_once)
        with pytest.raises(grpc.RpcError) as error:
            client.ask("hello", max_new_tokens=8)
        assert error.value.code() == grpc.StatusCode.INTERNAL
        answer = client.ask("hello", max_new_tokens=8, **GREEDY)[0]
        assert answer.response == texts(model, ["hello"], 8)[0]
        wait_until(lambda: _all_free(client), 5, "all KV is free again")


def _all_free(client: support.Served) -> bool:
    engine = client.pipeline.inference_engine
    return bool(int(engine.free_blocks[0]) * BLOCK_SIZE == engine.total_tokens)


@PATCHED_AND_STOCK
@pytest.mark.parametrize("stream", [False, True])
def test_starved_kv_loses_no_token(stream: bool, stock: bool, model: Path) -> None:
    """Five requests that need 400 tokens of KV together, with 256."""
    with served(model, stock=stock, kv_blocks=2, step=32) as client:
        preempted = []
        reset = client.pipeline.reset_request_status
        client.pipeline.reset_request_status = lambda: preempted.append(reset())
        generate: Any = (
            client.streamed if stream else lambda *a, **k: client.ask(*a, **k)[0].response
        )
        calls = [
            lambda prompt=prompt: generate(prompt, max_new_tokens=50, **GREEDY)
            for prompt in PROMPTS
        ]
        answers = client.together(*calls)
        assert preempted
        assert answers == texts(model, PROMPTS, 50)


@PATCHED_AND_STOCK
def test_stop_strings_are_a_list_and_may_be_of_several_tokens(stock: bool, model: Path) -> None:
    whole = texts(model, ["the cat sat on"], 24)[0]
    stop = whole[6:9]
    with served(model, stock=stock) as client:
        answer = client.ask(
            "the cat sat on", max_new_tokens=24, stop=["never there", stop], **GREEDY
        )[0]
        assert answer.response == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"
        text = client.streamed("the cat sat on", max_new_tokens=24, stop=[stop], **GREEDY)
        assert text == whole[: whole.index(stop)]


@PATCHED_AND_STOCK
def test_the_end_token_ends_a_request_with_stop_strings(stock: bool, tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    tokens = greedy(folder, ["the cat"], 8)[0]
    end = next(i for i in range(3, 8) if tokens[i] not in tokens[:i])
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [1, tokens[end]]}))
    with served(folder, stock=stock) as client:
        answer = client.ask("the cat", do_sample=False, max_new_tokens=24, stop=["never there"])[0]
        assert (answer.finish_reason, answer.generated_tokens) == ("stop", end + 1)


@PATCHED_AND_STOCK
@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"max_new_tokens": 0}, 0),
        ({"max_new_tokens": 1}, 1),
        ({"max_new_tokens": 99, "max_length": 11}, 7),
    ],
)
def test_lengths_are_exact(limits: dict[str, Any], count: int, stock: bool, model: Path) -> None:
    prompt_tokens = len(tf.AutoTokenizer.from_pretrained(model)("the cat").input_ids)
    if "max_length" in limits:
        limits = limits | {"max_length": prompt_tokens + count}
    if stock and limits == {"max_new_tokens": 1}:
        pytest.xfail("stock MII gets this one right")
    with served(model, stock=stock) as client:
        answer = client.ask("the cat", **{**GREEDY, **limits})[0]
    assert (answer.generated_tokens, answer.finish_reason) == (count, "length")


@PATCHED_AND_STOCK
def test_the_end_token_is_not_taken_too_early(stock: bool, tmp_path: Path) -> None:
    """The end token is what would be sampled first; the prompt counts for nothing."""
    folder = write_model("llama", tmp_path / "llama")
    end = greedy(folder, ["the cat"], 1)[0][0]
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(folder)
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.generation_config.save_pretrained(folder)
    inputs = tokenizer("the cat", return_tensors="pt")
    want = model.generate(**inputs, do_sample=False, min_new_tokens=12, max_new_tokens=30)
    new = want[0, inputs.input_ids.shape[1] :].tolist()
    with served(folder, stock=stock) as client:
        answer = client.ask("the cat", do_sample=False, min_new_tokens=12, max_new_tokens=30)[0]
    assert answer.generated_tokens == len(new)
    assert answer.response == tokenizer.decode(new, skip_special_tokens=True)


@PATCHED_AND_STOCK
def test_a_cancelled_call_frees_its_kv(stock: bool, model: Path) -> None:
    with served(model, stock=stock) as client:
        call = client.stream("hello", max_new_tokens=400, **GREEDY)
        next(call)
        assert not _all_free(client)
        call.cancel()
        wait_until(lambda: _all_free(client), 5, "its KV is free")
        assert client.ask("hello", max_new_tokens=4, **GREEDY)


@PATCHED_AND_STOCK
def test_an_idle_scheduler_sleeps(stock: bool, model: Path) -> None:
    with served(model, stock=stock) as client:
        client.ask("hello", max_new_tokens=4)
        time.sleep(1)
        rounds = []
        generate = client.pipeline.generate
        client.pipeline.generate = lambda: rounds.append(generate())
        time.sleep(2)
        assert len(rounds) < 20


@PATCHED_AND_STOCK
def test_bad_parameters_are_refused(stock: bool, model: Path) -> None:
    with served(model, stock=stock) as client:
        for bad in (
            *({"nope": 1}, {"top_p": 3.0}, {"max_length": 1}, {"stop": [1]}),
            *({"max_length": "abc"}, {"seed": "abc"}, {"min_p": 1.5}, {"logit_bias": {"5": 1.0}}),
            *({"min_new_tokens": -5}, {"max_new_tokens": -5}),
        ):
            with pytest.raises(grpc.RpcError) as error:
                client.ask("a secret prompt", **bad)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "secret" not in error.value.details()
        assert client.ask("hello", max_new_tokens=2)


def test_an_empty_prompt_does_not_disturb_other_requests(tmp_path: Path) -> None:
    """A tokenizer without BOS makes no tokens of it. (Stock MII's scheduler spins for ever.)"""
    folder = write_model("qwen2", tmp_path / "qwen2")
    with served(folder) as client:
        call = client.stream("hello", max_new_tokens=40, **GREEDY)
        text = next(call).response[0].response
        with pytest.raises(grpc.RpcError, match="prompt: has no tokens") as error:
            client.ask("", max_new_tokens=2)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        text += "".join(each.response[0].response for each in call)
        assert text == texts(folder, ["hello"], 40)[0]


@pytest.mark.parametrize(
    "context",
    [LoopbackContext, pytest.param(zmq.Context, marks=pytest.mark.xfail(strict=True))],
)
def test_a_late_rank_misses_nothing(context: Any) -> None:
    """As MII does it: bind, wait, publish; the other rank connects later."""
    port, heard = free_port(), []

    def late() -> None:
        time.sleep(2)
        with zmq.Context() as other:
            subscriber = other.socket(zmq.SUB)
            subscriber.setsockopt(zmq.RCVTIMEO, 3000)
            subscriber.setsockopt_string(zmq.SUBSCRIBE, "")
            subscriber.connect(f"tcp://127.0.0.1:{port}")
            with contextlib.suppress(zmq.Again):
                heard.append(subscriber.recv_string())
            subscriber.close()

    thread = threading.Thread(target=late)
    thread.start()
    with context() as sockets:
        publisher = sockets.socket(zmq.PUB)
        publisher.bind(f"tcp://*:{port}")
        if context is LoopbackContext:
            publisher.wait_for(1)
            assert publisher.getsockopt_string(zmq.LAST_ENDPOINT) == f"tcp://127.0.0.1:{port}"
        else:
            time.sleep(1)
        publisher.send_string("the first step")
        thread.join()
        publisher.close()
    assert heard == ["the first step"]


def test_another_version_of_mii_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for patched, expected in ORIGINALS.values():
        check_source(patched, expected)
    with pytest.raises(EngineUnavailable, match=r"needs DeepSpeed-MII 0\.3\.3"):
        check_source(ORIGINALS["_do_serve"][0], ORIGINALS["serve"][1])


def test_a_folder_that_others_can_write_to_is_refused(cache: Path) -> None:
    assert stat.S_IMODE(private_cache().stat().st_mode) == 0o700
    cache.chmod(0o777)
    with pytest.raises(ConfigError, match="other users can write to"):
        private_cache()
