"""The DeepSpeed engine behind a real server; `ranks/` has the other models on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.model_store import pickled
from tests.support.models import greedy, write_model
from tests.support.processes import ranks_below, wait_until
from tests.support.server import HTTP, ROOT, Server, environment
from tests.support.torchserve import published

pytest.importorskip("deepspeed")

PROMPTS = ["hello", "the cat sat on", "a long prompt that takes several steps, " * 4, "x", "mat 12"]
COUNT = 16


def token_ids(server: Server, prompt: str, *, take: int | None = None, **body: int) -> list[int]:
    """The tokens that a stream of `/generate_stream` brings; its client leaves after `take`."""
    ids: list[int] = []
    request = {"prompt": prompt, "ignore_eos": True, **body}
    url = f"{server.url}/generate_stream"
    with HTTP.stream("POST", url, json=request, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for line in filter(None, answer.iter_lines()):
            ids += json.loads(line.removeprefix("data: ")).get("token_ids", [])
            if take is not None and len(ids) >= take:
                break
    return ids


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_two_ranks_give_the_tokens_of_one(kind: str, tmp_path: Path) -> None:
    """Five prompts at once in chunks, each a little later; two clients more that leave."""
    folder = write_model(kind, tmp_path / kind)
    setup = {"engine": "deepspeed", "tensor_parallel": 2, "max_step_tokens": 32}
    (folder / "setup_config.json").write_text(json.dumps(setup))

    with Server(tmp_path, {"TRIPTYCH_TEXT_MODEL": str(folder)}) as server:
        assert len(ranks_below(server.pid)) == 2

        def late(i: int, prompt: str) -> list[int]:
            time.sleep(0.03 * i)
            return token_ids(server, prompt, max_new_tokens=COUNT)

        with ThreadPoolExecutor(len(PROMPTS) + 2) as clients:
            leavers = [
                clients.submit(token_ids, server, PROMPTS[2], take=1, max_new_tokens=200)
                for _ in range(2)
            ]
            results = list(clients.map(late, range(len(PROMPTS)), PROMPTS))
        assert all(len(leaver.result()) < 200 for leaver in leavers)
        assert results == greedy(folder, PROMPTS, COUNT)
        wait_until(lambda: server.gauge("running_sequences") == 0, 10, "those who left are gone")


def test_torchserves_set_up_runs_as_it_was_published(tmp_path: Path) -> None:
    """Converted at import, by the commands of a user; `ranks/` has the other ways."""
    folder = published(tmp_path / "published")
    expected = greedy(write_model("opt", folder / "checkpoints"), PROMPTS[:2], 50, dtype="float16")
    pickled(folder / "checkpoints", shards=3)
    command = [sys.executable, "-m", "model_store_scripts.import_model", str(folder)]
    command += ["--name", "published", "--convert-checkpoints"]
    subprocess.run(command, cwd=ROOT, env=environment(tmp_path), check=True)
    with Server(tmp_path, {"TRIPTYCH_TEXT_MODEL": "published"}) as server:
        assert len(ranks_below(server.pid)) == 2
        assert [token_ids(server, prompt) for prompt in PROMPTS[:2]] == expected


def test_pickled_weights_are_not_served(tmp_path: Path) -> None:
    folder = published(tmp_path / "published")
    pickled(write_model("opt", folder / "checkpoints"), shards=2)
    server = Server(tmp_path, {"TRIPTYCH_TEXT_MODEL": str(folder)}).start()
    try:
        wait_until(lambda: server.process.poll() is not None, 60, "the server ends")  # type: ignore[union-attr]
    finally:
        server.stop()
    command = f"python -m model_store_scripts.import_model {folder} --name NAME --convert-checkp"
    assert command in server.log
    assert "Traceback" not in server.log
