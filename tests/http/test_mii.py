"""The MII engine over HTTP, chosen by one setting: same model, same API, same greedy tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import greedy
from tests.support.processes import mii_processes, wait_until
from tests.support.readme import ROOT, guide
from tests.support.server import HTTP, Server, environment

pytest.importorskip("mii")

PROMPTS = ["hello", "the cat sat on", "x"]
COUNT = 12
IMPORTS, SERVE, CALLS = guide("mii.md")
PERSISTENT = '{"engine": "mii", "mii": {"mode": "persistent", "deployment_name": "kept"}}\n'


@pytest.fixture(scope="module", params=["pipeline", "persistent"])
def served(
    request: pytest.FixtureRequest,
    text_model: Path,
    bentoml_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, str]]:
    """A server of the model that all HTTP tests have, in one of the modes.

    The persistent one is imported and served as the guide for users of MII says.
    """
    folder = tmp_path_factory.mktemp("mii")
    variables = {"MII_CACHE_PATH": str(folder / "cache")}
    if request.param == "persistent":
        (folder / "my-model").symlink_to(text_model)
        (folder / "persistent.json").write_text(PERSISTENT)
        for example in IMPORTS:
            example.check(url="", cwd=folder, env=environment(bentoml_home))
        variables |= SERVE.variables
    else:
        variables |= {"TRIPTYCH_TEXT_MODEL": str(text_model), "TRIPTYCH_TEXT_ENGINE": "mii"}
    with Server(bentoml_home, variables) as server:
        if request.param == "persistent":
            for example in CALLS:
                env = environment(bentoml_home, MII_CACHE_PATH=variables["MII_CACHE_PATH"])
                example.check(url=server.url, cwd=folder, env=env)
        yield server, request.param
    wait_until(lambda: not mii_processes(folder), 5, "nothing of the deployment is left")


def test_the_guide_shows_the_file_that_was_imported() -> None:
    assert f"```json\n{PERSISTENT}```" in (ROOT / "docs" / "mii.md").read_text()


def test_the_native_api_gives_the_tokens_of_generate(
    served: tuple[Server, str], text_model: Path
) -> None:
    server, _ = served
    body = {"prompts": PROMPTS, "max_new_tokens": COUNT, "ignore_eos": True, "temperature": 0}
    answer = server.post("/generate", body)
    assert answer.status_code == 200, answer.text
    outputs = answer.json()["outputs"]
    assert [output["generated_length"] for output in outputs] == [COUNT] * len(PROMPTS)
    for output, want in zip(outputs, greedy(text_model, PROMPTS, COUNT), strict=True):
        detokenized = server.post("/detokenize", {"tokens": want, "skip_special_tokens": True})
        assert output["generated_text"] == detokenized.json()["text"]


def test_openai_streams_and_stops(served: tuple[Server, str]) -> None:
    server, _ = served
    body = {
        "model": server.get("/v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": "who are you"}],
        "max_tokens": COUNT,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    whole = ""
    with HTTP.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                whole += choices[0]["delta"].get("content") or "" if choices else ""
    stop = whole[1]
    stopped = server.post("/v1/chat/completions", body | {"stream": False, "stop": [stop]})
    choice = stopped.json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)] != ""
    assert choice["finish_reason"] == "stop"


def test_bad_requests_are_the_clients(served: tuple[Server, str]) -> None:
    server, mode = served
    assert server.post("/generate", {"prompt": "x", "max_new_tokens": 100_000}).status_code == 400
    answer = server.post("/generate", {"prompt": "x", "max_new_tokens": 2, "logprobs": 1})
    assert answer.status_code == (200 if mode == "pipeline" else 400)
    if mode == "persistent":
        assert answer.json()["error"]["param"] == "logprobs"
