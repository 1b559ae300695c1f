"""The MII engine behind a runner, in both modes: the tokens of `generate`, faults, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
import transformers as tf

from api.app import create_app, serve_models
from api.http.admission import Admission
from api.http.middleware import RequestContextMiddleware
from api.models.served import ServedModels
from api.models.text import TextModel
from runners import create_runner
from runners.config.files import load_setup_config
from runners.config.model import MIITextConfig
from runners.contracts.errors import (
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    RunnerUnavailable,
)
from runners.contracts.runner import RunnerState
from runners.contracts.text import ChatMessage, ChatPrompt, TextRunner
from runners.engines.mii.deployment.ports import listens
from tests.conftest import CHAT_TEMPLATE
from tests.mii.conftest import Scripts
from tests.support.generating import collect, ids_of, request, serving, text_of, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import mii_processes, own_ranks, wait_until

pytestmark = pytest.mark.usefixtures("forked_ranks")
# Those tests come last: the others see no ranks but their own.
with_two_replicas = pytest.mark.asyncio(loop_scope="module")
PROMPTS = ["hello", "the cat sat on", "a long prompt that takes several steps, " * 4, "x", "mat 12"]
COUNT = 16
PERSISTENT = {"mode": "persistent"}
GREEDY_DEFAULTS = {"do_sample": False, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model("mistral", tmp_path_factory.mktemp("models") / "mistral")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@asynccontextmanager
async def mii(folder: Path, section: dict[str, Any], **overrides: Any) -> AsyncIterator[TextRunner]:
    async with serving(folder, engine="mii", mii=section, **overrides) as runner:
        yield runner


async def all_at_once(runner: TextRunner) -> list[list[int]]:
    deltas = await asyncio.gather(
        *(collect(runner, p, max_new_tokens=COUNT, ignore_eos=True) for p in PROMPTS)
    )
    return [ids_of(each) for each in deltas]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("section", [{}, PERSISTENT], ids=["pipeline", "persistent"])
async def test_both_modes_give_the_tokens_of_generate(
    section: dict[str, Any], ranks: int, model: Path, cache: Path
) -> None:
    async with mii(model, section, tensor_parallel=ranks, max_step_tokens=32) as runner:
        assert runner.info is not None
        assert runner.info.engine == "mii"
        assert await all_at_once(runner) == greedy(model, PROMPTS, COUNT)
        chat = ChatPrompt(messages=[ChatMessage(role="user", content="hello")])
        ids = await runner.tokenize(chat)
        answer = await collect(runner, chat, max_new_tokens=COUNT, ignore_eos=True)
        assert [ids_of(answer)] == greedy(model, [ids], COUNT)
        sampled = {"temperature": 1.0, "seed": 7, "max_new_tokens": 12, "ignore_eos": True}
        once, again = [await collect(runner, "mat", **sampled) for _ in range(2)]
        assert ids_of(once) == ids_of(again)
        likeliest = await collect(runner, "mat", **sampled | {"min_p": 1.0})
        assert [ids_of(likeliest)] == greedy(model, ["mat"], 12)
        with pytest.raises(ContextLengthExceeded):
            await collect(runner, "hello", max_new_tokens=10_000)
    wait_until(lambda: not mii_processes(cache), 5, "all of the deployment is gone")


async def complete(runner: TextRunner, prompt: str) -> str:
    """The text of `POST /v1/completions` without any sampling parameter."""
    app = create_app()
    serve_models(app, ServedModels(TextModel(runner, Admission(1))))
    transport = httpx.ASGITransport(RequestContextMiddleware(app, timeout=60))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = {"model": runner.name, "prompt": prompt, "max_tokens": COUNT}
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def greedy_text(folder: Path, prompt: str) -> str:
    """The text of `model.generate(do_sample=False)`."""
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.decode(greedy(folder, [prompt], COUNT)[0], skip_special_tokens=True))


async def test_a_detached_deployment_is_reused(model: Path, cache: Path, scripts: Scripts) -> None:
    """It outlives its runner, serves stock MII's client, and ends when that terminates it."""
    section = PERSISTENT | {"keep_alive": True, "deployment_name": "kept"}
    async with mii(model, section) as runner:
        before = {p.pid for p in mii_processes(cache)}
        assert await all_at_once(runner) == greedy(model, PROMPTS, COUNT)
        assert not {p.pid for p in psutil.Process().children(recursive=True)} & before
    async with mii(model, section) as runner:
        assert {p.pid for p in mii_processes(cache)} == before
        assert await all_at_once(runner) == greedy(model, PROMPTS, COUNT)
        port = json.loads((cache / "kept" / "deployment.json").read_text())["port"]
        connected = PERSISTENT | {"host": "127.0.0.1", "port_number": port}
        async with mii(model, connected) as other:
            assert await all_at_once(other) == greedy(model, PROMPTS, COUNT)
    printed = scripts.run(
        """
import mii
client = mii.client("kept")
print(len(client("hello", max_new_tokens=5, ignore_eos=True)[0].generated_text) > 0)
client.terminate_server()
"""
    )
    assert "True" in printed
    wait_until(lambda: not mii_processes(cache), 10, "all of the deployment is gone")


async def test_a_lost_rank_takes_its_deployment_along_and_both_come_back(
    model: Path, cache: Path
) -> None:
    async with mii(model, PERSISTENT) as runner:
        before = {p.pid for p in mii_processes(cache)}
        [rank] = own_ranks()
        rank.kill()
        async with asyncio.timeout(30):
            while runner.health().ready:
                await asyncio.sleep(0.01)
        await wait_ready(runner)
        assert not {p.pid for p in mii_processes(cache)} & before
        assert await all_at_once(runner) == greedy(model, PROMPTS, COUNT)


async def test_a_model_that_cannot_be_loaded_fails_with_the_reason(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    config: Any
    config, _ = load_setup_config(
        folder, name="llama", overrides={"engine": "mii", "mii": PERSISTENT}
    )
    runner = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(90):
            while runner.health().state is not RunnerState.FAILED:
                await asyncio.sleep(0.05)
        assert "cannot be loaded" in runner.health().detail
    finally:
        await runner.stop()


async def test_the_forerunners_file_runs_as_it_was(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    file = {"model_name": "mistralai/Mistral-7B-v0.1", "task": "text-generation"}
    for key in (None, "mii_config", "mii_configs"):
        section = {key: {"dtype": "fp32", "tensor_parallel": 1}} if key else {}
        (tmp_path / "setup_config.json").write_text(json.dumps(file | section))
        config: Any
        config, warnings = load_setup_config(tmp_path, name="m")
        assert (config.engine, warnings) == ("mii", [])
    async with serving(tmp_path) as runner:
        assert await all_at_once(runner) == greedy(model, PROMPTS, COUNT)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"nope": 1}, "mii.nope"),
        ({"generate": {"top_q": 1}}, "mii.generate.top_q"),
        ({"inference_engine_config": {"state_manager": {"x": 1}}}, "state_manager.x"),
        ({"replica_num": 2}, "replica_num needs mode persistent"),
        ({"mode": "persistent", "host": "a"}, "host needs port_number"),
        ({"mode": "elsewhere"}, "mii.mode"),
        ({"dtype": "int3"}, "mii.dtype: must be one of"),
        ({"task": "nope"}, "task: must be one of"),
        ({"deployment_name": "../x"}, "mii.deployment_name"),
        (
            {"mode": "persistent", "host": "a", "port_number": 1, "replica_num": 2},
            "replica_num has no effect with host",
        ),
        ([], "mii: must be an object"),
    ],
)
def test_mistakes_are_named(section: Any, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "setup_config.json").write_text(json.dumps({"engine": "mii", "mii": section}))
    with pytest.raises(ConfigError) as error:
        load_setup_config(tmp_path, name="m")
    assert sentence in error.value.message


@pytest.mark.parametrize(
    ("section", "ignored"),
    [
        (
            {"device_map": 0, "port_number": 1, "deployment_name": "x", "torch_dist_port": 1234},
            ["device_map", "port_number", "deployment_name", "torch_dist_port"],
        ),
        ({"mode": "persistent", "device_map": 0, "port_number": 1, "deployment_name": "x"}, []),
        (
            {"mode": "persistent", "host": "a", "port_number": 1, "deployment_name": "x"},
            ["deployment_name"],
        ),
        ({"tokenizer": "other/tokenizer"}, ["tokenizer"]),
        ({"model_name_or_path": "a/b", "tokenizer": "a/b"}, []),
        ({"generate": {"prompt_length": 3}}, ["generate.prompt_length"]),
    ],
)
def test_what_has_no_use_is_named(section: Any, ignored: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "setup_config.json").write_text(json.dumps({"engine": "mii", "mii": section}))
    _, warnings = load_setup_config(tmp_path, name="m")
    assert [each.split(" ")[1] for each in warnings] == [f"mii.{name}" for name in ignored]


def test_the_forerunners_file_is_known_by_its_keys(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw = {"model_name": "a/b", "task": "text_generation", "max_new_tokens": 7}
    (tmp_path / "setup_config.json").write_text(json.dumps(raw))
    config: Any
    config, warnings = load_setup_config(tmp_path, name="m")
    assert (config.engine, config.task, config.max_new_tokens) == ("mii", "text-generation", 7)
    assert warnings == []


def test_the_forerunners_file_may_do_without_a_section(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    beside = {"dtype": "fp16", "replica_num": 2, "mode": "persistent", "enable_cuda_graph": True}
    raw = {"model_name": "a/b", "task": "text-generation", "mii_config": {"replica_num": 3}}
    (tmp_path / "setup_config.json").write_text(json.dumps(raw | beside | {"handler_made_up": 1}))
    config: Any
    config, warnings = load_setup_config(tmp_path, name="m")
    assert isinstance(config, MIITextConfig)
    assert (config.dtype, config.mii.mode, config.mii.replica_num) == ("float16", "persistent", 3)
    assert [each.split(" is ")[0] for each in warnings] == [
        "setup_config.json: unknown key handler_made_up",
        "setup_config.json: mii.enable_cuda_graph",
    ]


def test_a_host_is_a_name_or_an_address_of_either_kind() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        assert listens(server.getsockname()[1], "::1")
    assert not listens(1, "::1")
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid has no address"):
        listens(1, "no-such-host.invalid")


async def test_miis_defaults_apply_to_requests_that_name_no_value(model: Path) -> None:
    section = {"generate": GREEDY_DEFAULTS | {"max_new_tokens": 5}}
    (setup := model / "setup_config.json").write_text(
        json.dumps({"engine": "mii", "mii": section | {"max_length": 100}})
    )
    try:
        async with serving(model) as runner:
            assert [ids_of(await collect(runner, "hello"))] == greedy(model, ["hello"], 5)
            assert await complete(runner, "hello") == greedy_text(model, "hello")
            assert runner.info is not None
            assert runner.info.max_context == 100
    finally:
        setup.unlink()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two_replicas(
    model: Path, forked_ranks: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[TextRunner, Path]]:
    """A deployment with two replicas, MII's defaults and a long context; its cache folder."""
    folder = tmp_path_factory.mktemp("two-replicas")
    # Long enough for neither of two streams to end before the other has begun.
    longer = shutil.copytree(model, folder / "longer")
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    section = PERSISTENT | {"replica_num": 2, "generate": GREEDY_DEFAULTS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MII_CACHE_PATH", str(folder / "cache"))
        async with mii(longer, section, max_kv_tokens=16384) as runner:
            yield runner, folder / "cache"


@with_two_replicas
async def test_a_deployment_has_miis_defaults_and_refuses_what_it_cannot_do(
    model: Path, two_replicas: tuple[TextRunner, Path]
) -> None:
    runner, _ = two_replicas
    assert await complete(runner, "hello") == greedy_text(model, "hello")
    for refused in (
        *({"logprobs": 1}, {"logprobs": 0}, {"repetition_penalty": 1.2}),
        *({"presence_penalty": 0.5}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}),
        {"logit_bias": {5: 1.0}},
    ):
        with pytest.raises(InvalidRequest, match="not available from a persistent MII"):
            await collect(runner, "hello", **refused)
    with pytest.raises(InvalidRequest, match=r"use mii\.mode pipeline"):
        await collect(runner, [ord("h"), ord("e"), 200, 201], max_new_tokens=2)


@with_two_replicas
async def test_six_clients_of_two_replicas(
    model: Path, two_replicas: tuple[TextRunner, Path]
) -> None:
    """20 requests each: greedy, sampled, with stop strings, and streams that are closed early."""
    want = dict(zip(PROMPTS, greedy(model, PROMPTS, COUNT), strict=True))
    runner, _ = two_replicas

    async def client(seed: int) -> int:
        rng, checked = random.Random(seed), 0
        for _ in range(20):
            prompt = rng.choice(PROMPTS)
            match rng.randrange(4):
                case 0:
                    deltas = await collect(runner, prompt, max_new_tokens=COUNT, ignore_eos=True)
                    assert ids_of(deltas) == want[prompt]
                    checked += 1
                case 1:
                    await collect(
                        runner,
                        prompt,
                        max_new_tokens=rng.randrange(1, 24),
                        temperature=rng.choice([0.3, 1.0, 2.0]),
                        top_k=rng.choice([0, 5, None]),
                        top_p=rng.choice([1.0, 0.4, None]),
                    )
                case 2:
                    stop = rng.sample(["a", "e", "th", "zq"], rng.randrange(1, 4))
                    deltas = await collect(runner, prompt, max_new_tokens=24, stop=stop)
                    assert not any(s in text_of(deltas) for s in stop)
                case _:
                    stream = await runner.submit(
                        request(prompt, max_new_tokens=300, ignore_eos=True)
                    )
                    async for _ in stream:
                        break
                    await stream.aclose()
        return checked

    async with asyncio.timeout(200):
        assert sum(await asyncio.gather(*map(client, range(6)))) > 10
    assert await all_at_once(runner) == list(want.values())
    assert runner.health().restarts == 0


@with_two_replicas
async def test_a_killed_replica_fails_its_own_requests_and_comes_back(
    model: Path, two_replicas: tuple[TextRunner, Path]
) -> None:
    runner, cache = two_replicas
    lost = next(p for p in mii_processes(cache) if p.cmdline()[-3:] == ["replica", "1", "0"])
    streams = [
        await runner.submit(request("hello", max_new_tokens=3000, ignore_eos=True))
        for _ in range(2)
    ]
    readers = [aiter(stream) for stream in streams]
    for reader in readers:
        await anext(reader)
    killed_at = time.monotonic()
    os.kill(lost.pid, signal.SIGKILL)

    async def rest(reader: Any) -> str:
        try:
            return "".join([delta.text async for delta in reader])
        except RunnerUnavailable as error:
            assert time.monotonic() - killed_at < 5
            return error.message

    ends = await asyncio.gather(*map(rest, readers))
    down = [end for end in ends if "replica 1 went down with the request in flight" in end]
    assert len(down) == 1, [end[-200:] for end in ends]
    assert await all_at_once(runner) == greedy(model, PROMPTS, COUNT)
    assert runner.health().restarts == 0
    async with asyncio.timeout(60):
        while not [p for p in mii_processes(cache) if p.cmdline()[-3:] == ["replica", "1", "0"]]:
            await asyncio.sleep(0.1)
    assert await all_at_once(runner) == greedy(model, PROMPTS, COUNT)
