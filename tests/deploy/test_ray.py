"""The service under Ray Serve: two replicas on a local Ray, text streaming included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from runners.mii_deployment.places import free_port
from tests.support.models import greedy
from tests.support.processes import alive, descendants, ranks_below, wait_until
from tests.support.server import ROOT, environment

COUNT = 24


@dataclass(frozen=True)
class Running:
    """`serve run`, and where it listens."""

    url: str
    pid: int


@pytest.fixture(scope="module")
def ray(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two replicas; nothing of them or of Ray is left afterwards."""
    home, port = tmp_path_factory.mktemp("ray"), free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "triptych",
                "route_prefix": "/",
                "import_path": "deploy.ray_app:app",
                "deployments": [
                    {
                        "name": "Triptych",
                        "num_replicas": 2,
                        "ray_actor_options": {"num_cpus": 0.5},
                    }
                ],
            }
        ],
    }
    (home / "serve.yaml").write_text(yaml.safe_dump(config))
    choices = {"TRIPTYCH_TEXT_MODEL": str(text_model), "TRIPTYCH_NUM_THREADS": "1"}
    variables = environment(home, HOME=str(home), RAY_USAGE_STATS_ENABLED="0", **choices)
    command = [str(Path(sys.executable).with_name("serve")), "run", str(home / "serve.yaml")]
    with (
        (home / "ray.log").open("wb") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=log, process_group=0
        ) as serve,
    ):

        def both_ready() -> bool:
            assert serve.poll() is None, (home / "ray.log").read_text()[-3000:]
            try:
                return ready(f"http://127.0.0.1:{port}") and len(ranks_below(serve.pid)) == 2
            except httpx.TransportError:
                return False

        try:
            wait_until(both_ready, 180, "both replicas are there")
            yield Running(f"http://127.0.0.1:{port}", serve.pid)
        finally:
            family = descendants(serve.pid)
            os.killpg(serve.pid, signal.SIGINT)
            try:
                serve.wait(60)
                wait_until(lambda: not alive(family), 30, "all of Ray is gone")
            finally:
                for process in alive(family):
                    process.kill()


def ready(url: str) -> bool:
    return httpx.get(f"{url}/readyz", timeout=30).status_code == 200


def test_text_streams_as_it_is_made(ray: Running, text_model: Path) -> None:
    [want] = greedy(text_model, ["hello"], COUNT)
    body = {"prompt": "hello", "max_new_tokens": COUNT, "ignore_eos": True, "temperature": 0}
    ids, arrivals = [], 0
    with httpx.stream("POST", f"{ray.url}/generate_stream", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for chunk in answer.iter_text():
            arrivals += 1
            for line in chunk.splitlines():
                if line.startswith("data: "):
                    ids += json.loads(line.removeprefix("data: ")).get("token_ids", [])
    assert ids == want
    assert arrivals > COUNT / 4, "the answer came in one piece"


def test_both_replicas_answer(ray: Running) -> None:
    ranks = ranks_below(ray.pid)
    before = [rank.cpu_times().user for rank in ranks]
    with openai.OpenAI(base_url=f"{ray.url}/v1", api_key="none", max_retries=0) as client:
        [model] = [each.id for each in client.models.list()]
        for _ in range(16):
            client.completions.create(model=model, prompt="a", max_tokens=50)
    assert all(rank.cpu_times().user > used for rank, used in zip(ranks, before, strict=True))


def test_bad_input_keeps_its_status(ray: Running) -> None:
    answer = httpx.post(f"{ray.url}/generate", json={"prompt": 3}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
