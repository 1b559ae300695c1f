"""From `bentoml serve` to SIGTERM: what stops a start, readiness, a dead rank, bentos."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.support.processes import alive, descendants, ranks_below, wait_until
from tests.support.server import HTTP, ROOT, Server, bentoml_command, environment

IMPORT = """
import bentoml, shutil, sys
with bentoml.models.create(sys.argv[2]) as model:
    shutil.copytree(sys.argv[1], model.path, dirs_exist_ok=True)
print(model.tag)
"""


def run(home: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(home, **variables)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def refused(home: Path, **variables: str) -> str:
    """The one sentence with which a start is refused."""
    done = run(
        home, *bentoml_command("serve", ".", "--host", "127.0.0.1", "--port", "1"), **variables
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("triptych: ")
    return sentence


@pytest.fixture(scope="module")
def store(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BentoML home whose model store has one text model, `small`."""
    home = tmp_path_factory.mktemp("store")
    run(home, sys.executable, "-c", IMPORT, str(text_model), "small").check_returncode()
    return home


def test_importing_the_service_loads_no_engine() -> None:
    heavy = ["torch", "transformers", "accelerate", "deepspeed", "mii", "diffusers"]
    script = f"import service, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_spans_are_made_only_for_an_exporter(store: Path) -> None:
    script = "import service; print(service.Triptych.config.get('tracing'))"
    configured = {"BENTOML_CONFIG_OPTIONS": "services.triptych.tracing.exporter_type=otlp"}
    for variables, tracing in [({}, "{'excluded_urls': '.*'}"), (configured, "None")]:
        done = run(store, sys.executable, "-W", "ignore", "-c", script, **variables)
        assert done.stdout.strip() == tracing, done.stderr


def test_a_start_without_a_model_says_what_to_set(store: Path) -> None:
    sentence = refused(store)
    assert "TRIPTYCH_TEXT_MODEL" in sentence
    assert re.search(r"text models in the store: small:\w+", sentence)


def test_a_start_with_an_unknown_model_lists_the_store(store: Path) -> None:
    assert "small:" in refused(store, TRIPTYCH_TEXT_MODEL="smal")


def test_a_start_with_a_wrong_setting_names_it(store: Path) -> None:
    assert "TRIPTYCH_MAX_QUEUE" in refused(store, TRIPTYCH_MAX_QUEUE="many")


def test_a_start_with_a_wrong_config_names_the_field(text_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(text_model, tmp_path / "wrong")
    (folder / "setup_config.json").write_text('{"engine": "steam"}')
    assert "engine: must be one of" in refused(tmp_path, TRIPTYCH_TEXT_MODEL=str(folder))


def test_a_start_with_two_workers_is_refused(store: Path) -> None:
    options = "services.triptych.workers=2"
    sentence = refused(store, TRIPTYCH_TEXT_MODEL="small", BENTOML_CONFIG_OPTIONS=options)
    assert sentence.startswith("triptych: services.triptych.workers is 2")


@pytest.fixture(scope="module")
def starting(text_model: Path, bentoml_home: Path) -> Iterator[Server]:
    """A server that is not ready yet when the first test gets it."""
    running = Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(text_model)}).start()
    yield running
    running.stop()


def test_nothing_is_served_before_the_model_is_there(starting: Server) -> None:
    wait_until(lambda: starting.readiness()[0] != 0, 30, "the server listens")
    status, detail = starting.readiness()
    assert status == 503
    assert re.match(r"(starting|loading): \w+", detail)
    assert starting.get("/livez").status_code == 200
    for route, body in [
        ("/generate", {"prompt": "a"}),
        ("/generate_stream", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
    ]:
        answer = starting.post(route, body)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "model_not_ready"
    assert starting.get("/v1/models").json()["data"][0]["id"] == "tiny-llama"
    assert starting.gauge("ready") == 0
    starting.wait_ready()
    assert starting.gauge("ready") == 1


def test_a_dead_rank_ends_its_streams_with_an_error_and_comes_back(starting: Server) -> None:
    starting.wait_ready()
    native = {"prompt": "hello", "max_new_tokens": 8000, "ignore_eos": True}
    [rank] = ranks_below(starting.pid)
    with (
        HTTP.stream("POST", starting.url + "/generate_stream", json=native, timeout=30) as raw,
        openai.OpenAI(base_url=f"{starting.url}/v1", api_key="-", max_retries=0) as client,
        client.completions.create(
            model="tiny-llama",
            prompt="hello",
            max_tokens=8000,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as chunks,
    ):
        lines = raw.iter_lines()
        assert next(lines).startswith("data: ")
        assert next(chunks).choices
        os.kill(rank.pid, signal.SIGKILL)
        rest = [line for line in lines if line]
        with pytest.raises(openai.APIError, match="went down"):
            list(chunks)
    assert rest[-2] == "event: error"
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "model_not_ready"
    assert starting.get("/livez").status_code == 200
    starting.wait_ready()
    assert starting.gauge("restarts") == 1
    assert starting.post("/generate", {"prompt": "a", "max_new_tokens": 1}).status_code == 200


def test_an_idle_ranks_death_is_told_and_mended(starting: Server) -> None:
    starting.wait_ready()
    restarts = starting.gauge("restarts")
    [rank] = ranks_below(starting.pid)
    os.kill(rank.pid, signal.SIGKILL)
    seen: list[tuple[int, str]] = []

    def told() -> bool:
        seen.append(starting.readiness())
        return "rank 0 was killed by SIGKILL" in seen[-1][1]

    wait_until(told, 10, "the reason is there")
    assert seen[-1][0] == 503
    starting.wait_ready()
    assert starting.gauge("restarts") == restarts + 1
    assert starting.post("/generate", {"prompt": "a", "max_new_tokens": 1}).status_code == 200


def test_sigterm_lets_a_stream_finish(starting: Server) -> None:
    starting.wait_ready()
    body = {"prompt": "hello", "max_new_tokens": 1000, "ignore_eos": True}
    url = starting.url + "/generate_stream"
    with (
        httpx.Client() as probe,
        HTTP.stream("POST", url, json=body, timeout=30) as answer,
    ):
        assert probe.get(starting.url + "/readyz").status_code == 200
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(starting.pid, signal.SIGTERM)
        wait_until(lambda: starting.readiness()[0] == 0, 5, "new connections are refused")
        # The connection that the probe has kept is served until it has been idle.
        with contextlib.suppress(httpx.ConnectError):
            unready = probe.get(starting.url + "/readyz")
            assert (unready.status_code, unready.headers["connection"]) == (503, "close")
        *_, totals = [line for line in lines if line]
    assert json.loads(totals.removeprefix("data: "))["generated_length"] == 1000
    starting.stop()


def test_a_drain_that_takes_too_long_tells_its_clients(
    text_model: Path, bentoml_home: Path
) -> None:
    server = Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(text_model)})
    server.command += ["--timeout-graceful-shutdown", "1"]
    endless = {"prompt": "hello", "max_new_tokens": 8000, "ignore_eos": True}
    with server, ThreadPoolExecutor() as pool:
        stream, unary = (
            pool.submit(server.post, path, endless) for path in ("/generate_stream", "/generate")
        )
        wait_until(lambda: server.gauge("running_sequences") == 2, 10, "both are generated")
        server.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        error, data = stream.result().text.rstrip().rsplit("\n", 2)[-2:]
        assert error == "event: error"
        told = json.loads(data.removeprefix("data: "))["error"]
        assert told["message"].startswith("the server is shutting down")
        assert told == unary.result().json()["error"]
        assert unary.result().status_code == 503
        assert int(unary.result().headers["retry-after"]) > 0
        server.stop()
        assert server.process is not None
        assert server.process.returncode == 0


@pytest.mark.parametrize("state", ["loading", "ready"])
def test_ctrl_c_leaves_no_process(text_model: Path, bentoml_home: Path, state: str) -> None:
    server = Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(text_model)}).start()
    try:
        if state == "ready":
            server.wait_ready()
        wait_until(lambda: bool(ranks_below(server.pid)), 60, "the rank process is there")
        assert (server.readiness()[0] == 200) == (state == "ready")
    finally:
        server.stop(interrupt=True)
    server.assert_clean_log()


def test_what_is_killed_leaves_no_process_and_no_folder(
    text_model: Path, bentoml_home: Path
) -> None:
    """First the HTTP worker, whose place another one takes, then `bentoml serve`."""
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:  # a short path, for sockets
        variables = {"TRIPTYCH_TEXT_MODEL": str(text_model), "TMPDIR": folder}
        server = Server(bentoml_home, variables).start()

        def workers() -> list[psutil.Process]:
            return [p for p in descendants(server.pid) if p.ppid() == server.pid]

        def owners() -> set[int]:
            return {int(path.name.split("-")[1]) for path in Path(folder).glob("triptych-*")}

        try:
            wait_until(lambda: bool(ranks_below(server.pid)), 60, "the rank process is there")
            [first], below = workers(), ranks_below(server.pid)
            first.kill()
            wait_until(lambda: alive([first, *below]) == [], 10, "the ranks end with their worker")
            wait_until(lambda: bool(ranks_below(server.pid)), 60, "another worker starts")
            [second] = workers()
            assert owners() == {server.pid, second.pid}
            family = [psutil.Process(server.pid), *descendants(server.pid)]
            family[0].kill()
            wait_until(lambda: alive(family) == [], 10, "all end with the server")
        finally:
            server.stop()
        script = "from runners.protocol.folders import process_folder; process_folder()"
        run(bentoml_home, sys.executable, "-c", script, TMPDIR=folder).check_returncode()
        assert owners() == set()


def test_a_runner_that_gave_up_is_not_alive(
    text_model: Path, bentoml_home: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(text_model, tmp_path / "mute")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    server = Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(folder)}).start()
    try:
        wait_until(lambda: server.readiness()[1].startswith("failed"), 60, "the start has failed")
        status, detail = server.readiness()
        assert status == 503
        assert "tokenizer" in detail
        answer = server.get("/livez")
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, detail)
        ping = server.get("/ping")
        assert (ping.status_code, ping.json()) == (500, {"status": "Unhealthy"})
    finally:
        server.stop()


def build(home: Path, *arguments: str) -> str:
    """Build a bento; returns its tag."""
    done = run(home, *bentoml_command("build", ".", "-o", "tag", *arguments))
    assert done.returncode == 0, done.stderr
    found = re.search(r"triptych:\w+", done.stdout)
    assert found is not None
    return found[0]


def test_a_bento_serves_the_model_it_was_built_with(
    store: Path, text_model: Path, tmp_path: Path
) -> None:
    tag = build(store, "--arg", "text_model=small")
    manifest = (store / "bentos" / tag.replace(":", "/") / "bento.yaml").read_text()
    frozen = re.search(r"tag: (small:\w+)", manifest)
    assert frozen is not None, "the model is recorded in the bento"
    # A newer version in the store must not change what the bento serves.
    newer = shutil.copytree(text_model, tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    run(store, sys.executable, "-c", IMPORT, str(newer), "small").check_returncode()
    with Server(store, {}, target=tag, cwd=tmp_path) as server:
        [model] = server.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("small", 8192)
    # The environment has the last word.
    variables = {"TRIPTYCH_TEXT_MODEL": str(newer), "TRIPTYCH_MAX_KV_TOKENS": "500"}
    with Server(store, variables, target=tag, cwd=tmp_path) as server:
        [model] = server.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("newer", 481)  # whole blocks of 32
        assert server.post("/tokenize", {"prompt": "a"}).json()["max_model_len"] == 481


def test_a_bento_without_a_model_builds_and_asks_for_one(store: Path) -> None:
    done = run(store, *bentoml_command("serve", build(store), "--port", "1"))
    assert done.returncode != 0
    assert "TRIPTYCH_TEXT_MODEL" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
