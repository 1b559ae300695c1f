"""The service under Ray Serve: two replicas on a local Ray, deployed from the rendered config."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from runners.engines.mii.deployment.ports import free_port
from tests.support.models import greedy
from tests.support.processes import ranks_below, wait_until
from tests.support.ray_cluster import RayCluster
from tests.support.server import HTTP, ROOT, environment

COUNT, LIMIT, KEY = 24, 4, "sesame"


@dataclass(frozen=True)
class Deployed:
    """The application, a client for it, and its config file."""

    cluster: RayCluster
    client: httpx.Client
    config: str


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    from tests.support.image_models import write_image_model

    return write_image_model(
        "stable-diffusion", tmp_path_factory.mktemp("models") / "tiny-diffusion"
    )


@pytest.fixture(scope="module")
def ray(
    text_model: Path, image_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """Two replicas of a text and an image model. No process or file of them or of Ray remains."""
    home, port = tmp_path_factory.mktemp("ray"), free_port()
    models = []
    for model in (text_model, image_model):
        models.append(shutil.copytree(model, home / "models" / model.name))
        (models[-1] / "setup_config.json").write_text('{"gpus": 0}')
    variables = {"PORT": str(port), "TRIPTYCH_MAX_QUEUE": str(LIMIT), "TRIPTYCH_NUM_THREADS": "1"}
    name = f"test-{secrets.token_hex(4)}"
    command = [sys.executable, "-m", "deploy.render", "ray", "--name", name, "--replicas", "2"]
    command += [f"--text-model={models[0]}", f"--image-model={models[1]}"]
    rendered = subprocess.run(
        command, cwd=ROOT, env=environment(home, **variables), stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    (home / "serve.yaml").write_text(rendered)
    [application] = yaml.safe_load(rendered)["applications"]
    tasks = Path(application["runtime_env"]["env_vars"]["BENTOML_RESULT_STORE"]).parent
    headers, url = {"Authorization": f"Bearer {KEY}"}, f"http://127.0.0.1:{port}"
    try:
        with (
            RayCluster(home, {"TRIPTYCH_API_KEY": KEY}) as cluster,
            httpx.Client(base_url=url, headers=headers, timeout=60) as client,
        ):
            cluster.deploy(home / "serve.yaml")
            assert len(ranks_below(cluster.pid)) == 4
            yield Deployed(cluster, client, rendered)
            cluster.shut_down()
            assert not list(cluster.temporary.glob("triptych-*"))
    finally:
        shutil.rmtree(tasks, ignore_errors=True)


def test_text_is_streamed_as_it_is_generated(ray: Deployed, text_model: Path) -> None:
    [want] = greedy(text_model, ["hello"], COUNT)
    body = {"prompt": "hello", "max_new_tokens": COUNT, "ignore_eos": True, "temperature": 0}
    ids, chunks = [], 0
    with ray.client.stream("POST", "/generate_stream", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for chunk in answer.iter_text():
            chunks += 1
            for line in chunk.splitlines():
                if line.startswith("data: "):
                    ids += json.loads(line.removeprefix("data: ")).get("token_ids", [])
    assert ids == want
    assert chunks > COUNT / 4, "the answer came in one piece"


def test_both_replicas_answer(ray: Deployed) -> None:
    url, mark = f"{ray.client.base_url}/v1", secrets.token_hex(8)
    with openai.OpenAI(
        base_url=url, api_key=KEY, max_retries=0, default_headers={"X-Request-ID": mark}
    ) as client:
        for _ in range(16):
            client.completions.create(model="tiny-llama", prompt="a", max_tokens=2)
    wait_until(lambda: sum(ray.cluster.answered(mark)) == 16, 10, "all 16 are logged")
    shares = ray.cluster.answered(mark)
    assert len(shares) == 2
    assert all(shares), shares


def test_bad_input_keeps_its_status(ray: Deployed) -> None:
    answer = ray.client.post("/generate", json={"prompt": 3})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_requests_above_the_limit_are_refused_and_probes_are_still_answered(
    ray: Deployed,
) -> None:
    body = {"prompt": "hello", "max_new_tokens": 8000, "ignore_eos": True}
    count = 2 * LIMIT + 1
    with ExitStack() as streams, ThreadPoolExecutor(count) as pool:

        def open_stream(_: int) -> httpx.Response:
            stream = ray.client.stream("POST", "/generate_stream", json=body)
            return streams.enter_context(stream)

        # All at the same time, so that none has ended when the last one comes.
        answers = list(pool.map(open_stream, range(count)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= LIMIT
        assert int(answers[statuses.index(429)].headers["retry-after"]) > 0
        assert ray.client.get("/readyz").status_code == 200


def test_metrics(ray: Deployed) -> None:
    ray.client.post("/generate", json={"prompt": 3})
    text = ray.client.get("/metrics").text
    assert 'triptych_admitted_sequences{model="tiny-llama"}' in text
    assert 'triptych_requests_total{route="' in text


def test_the_api_key_is_that_of_the_environment_of_ray_start(ray: Deployed) -> None:
    url = ray.client.base_url
    assert HTTP.get(f"{url}/v1/models").status_code == 401
    assert HTTP.get(f"{url}/readyz").status_code == 200
    assert ray.client.get("/v1/models").status_code == 200
    assert KEY not in ray.config + ray.cluster.status()


def test_any_replica_knows_a_job(ray: Deployed) -> None:
    request = {"prompt": "a red circle", "num_inference_steps": 40}
    answer = ray.client.post("/generate_image_task/submit", json=request)
    assert answer.status_code == 200, answer.text
    job = {"task_id": answer.json()["task_id"]}
    states: list[str] = []

    def completed() -> bool:
        status = ray.client.get("/generate_image_task/status", params=job)
        assert status.status_code == 200, f"after {states}: {status.text}"
        states.append(status.json()["status"])
        return states[-1] == "completed"

    wait_until(completed, 60, "the image is generated")
    for _ in range(8):
        image = ray.client.get("/generate_image_task/get", params=job)
        assert image.headers["content-type"] == "image/png", image.text
    [application] = yaml.safe_load(ray.config)["applications"]
    folder = Path(application["runtime_env"]["env_vars"]["BENTOML_RESULT_STORE"]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()
