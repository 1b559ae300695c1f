"""Pictures over HTTP: the native route, OpenAI's, tasks; refusals, leaving, beside a text model."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.support.images import Pixels, difference, diffusers_image, image_request
from tests.support.processes import ranks_below, wait_until
from tests.support.server import HTTP, Server

ASK: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.image_models import write_image_model  # loads torch

    folder = tmp_path_factory.mktemp("images") / "tiny-sd"
    return write_image_model("stable-diffusion", folder)


@pytest.fixture(scope="module")
def images(image_model: Path, bentoml_home: Path) -> Iterator[Server]:
    """A server with an image model alone."""
    variables = {"TRIPTYCH_IMAGE_MODEL": str(image_model), "TRIPTYCH_MAX_IMAGE_QUEUE": "6"}
    with Server(bentoml_home, variables) as running:
        yield running


@pytest.fixture(scope="module")
def right(image_model: Path) -> list[Pixels]:
    """What diffusers alone generates for `ASK` and the two seeds after it."""
    requests = [image_request(ASK["prompt"], seed=seed) for seed in (3, 4, 5)]
    return [diffusers_image(image_model, request) for request in requests]


def opened(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)))


def from_base64(text: str) -> Pixels:
    return opened(base64.b64decode(text))


def test_one_picture_is_its_file(images: Server, right: list[Pixels]) -> None:
    answer = images.post("/generate_image", ASK)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["x-seed"] == "3"
    assert difference(opened(answer.content), right[0]) <= 1
    for file in ("jpeg", "webp"):
        answer = images.post("/generate_image", ASK | {"format": file})
        assert answer.headers["content-type"] == f"image/{file}"
        assert Image.open(io.BytesIO(answer.content)).format == file.upper()
        assert np.abs(opened(answer.content).astype(int) - right[0]).mean() < 24


def test_bentomls_own_client_gets_files(images: Server, right: list[Pixels]) -> None:
    job = images.post("/generate_image_task/submit", ASK).json()["task_id"]
    script = f"""
import bentoml, json, time
with bentoml.SyncHTTPClient({images.url!r}) as client:
    one = client.generate_image({ASK!r})
    several = client.generate_image({ASK | {"num_images": 2}!r})
    while client.generate_image_task.get_status({job!r}).value == "in_progress":
        time.sleep(0.05)
    files = [one, several, client.generate_image_task.get({job!r})]
    print(json.dumps([file.read_bytes().hex() for file in files]))
"""
    # In a process of its own: the client leaves a folder behind, which is an error in this one.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    one, several, of_job = (bytes.fromhex(text) for text in json.loads(done.stdout))
    assert difference(opened(one), right[0]) <= 1
    assert opened(of_job).tolist() == opened(one).tolist()
    assert [image["seed"] for image in json.loads(several)["images"]] == [3, 4]


def test_a_seed_of_ours_makes_the_picture_again(images: Server) -> None:
    first = images.post("/generate_image", {k: v for k, v in ASK.items() if k != "seed"})
    again = images.post("/generate_image", ASK | {"seed": int(first.headers["x-seed"])})
    assert difference(opened(first.content), opened(again.content)) <= 1


def test_several_pictures_have_seeds_in_a_row(images: Server, right: list[Pixels]) -> None:
    answer = images.post("/generate_image", ASK | {"num_images": 3}).json()
    assert answer["seeds"] == [3, 4, 5] == [each["seed"] for each in answer["images"]]
    for each, picture in zip(answer["images"], right, strict=True):
        assert difference(from_base64(each["b64_json"]), picture) <= 1
    assert difference(right[0], right[1]) > 1


def test_pictures_as_an_array(images: Server, right: list[Pixels]) -> None:
    answer = images.post("/generate_image", ASK | {"num_images": 3, "response_format": "numpy"})
    array = answer.json()["array"]
    data = np.frombuffer(base64.b64decode(array["data"]), array["dtype"])
    pictures = data.reshape(array["shape"])
    assert pictures.shape == (3, 32, 32, 3)
    for picture, expected in zip(pictures, right, strict=True):
        assert difference(picture, expected) <= 1


def test_a_size_of_ones_own(images: Server) -> None:
    answer = images.post("/generate_image", ASK | {"height": 24, "width": 64})
    assert opened(answer.content).shape == (24, 64, 3)


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"height": 10_000, "width": 10_000}, "height", "at most 4096 pixels"),
        ({"height": 20_000}, "height", "less than or equal to 16383"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 900}, "num_inference_steps", "from 1 to 200"),
        ({"num_images": 11}, "num_images", "less than or equal to 10"),
        ({"num_images": 2, "response_format": "image"}, "response_format", "one image"),
        ({"width": 33}, "width", "multiple of 8"),
        ({"scheduler": "steam"}, "scheduler", "ddim"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"format": "gif"}, "format", "'png', 'jpeg' or 'webp'"),
        ({"steps": 3}, "steps", "is not a known field"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
    ],
)
def test_a_bad_request_is_told_and_costs_nothing(
    images: Server, change: dict[str, Any], param: str, said: str
) -> None:
    painted = steps_painted(images)
    answer = images.post("/generate_image", ASK | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert said in error["message"]
    assert steps_painted(images) == painted
    assert images.gauge("admitted_sequences") == 0


def steps_painted(server: Server) -> float:
    lines = [x for x in server.metrics().splitlines() if x.startswith("triptych_denoising_steps_t")]
    return sum(float(line.split()[-1]) for line in lines)


def test_more_pictures_than_fit_are_too_many(images: Server) -> None:
    answer = images.post("/generate_image", ASK | {"num_images": 7})
    assert answer.status_code == 400
    assert "admits at most 6" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_place_within_a_step(images: Server) -> None:
    [rank] = ranks_below(images.pid)
    body = ASK | {"num_inference_steps": 200, "num_images": 6}
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(images.url + "/generate_image", json=body, timeout=0.5)
    wait_until(lambda: images.gauge("admitted_sequences") == 0, 5, "the place is free")
    assert images.post("/generate_image", ASK).status_code == 200
    before = rank.cpu_times().user
    time.sleep(1.0)
    assert rank.cpu_times().user - before < 0.3


@pytest.fixture(scope="module")
def client(images: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{images.url}/v1", api_key="-", max_retries=0) as made:
        yield made


EXTRA = {"num_inference_steps": 4, "seed": 3}


def test_the_openai_client_gets_its_pictures(client: openai.OpenAI, right: list[Pixels]) -> None:
    answer = client.images.generate(
        model="tiny-sd", prompt=ASK["prompt"], n=2, size="32x32", extra_body=EXTRA
    )
    assert answer.data is not None
    assert (answer.size, answer.output_format) == ("32x32", "png")
    for each, picture in zip(answer.data, right, strict=False):
        assert difference(from_base64(each.b64_json or ""), picture) <= 1
    wide = client.images.generate(prompt="a", size="64x24", extra_body=EXTRA).data or []
    assert from_base64(wide[0].b64_json or "").shape == (24, 64, 3)


def test_the_openai_client_sees_the_steps(client: openai.OpenAI, right: list[Pixels]) -> None:
    events: list[Any] = list(
        client.images.generate(
            prompt=ASK["prompt"], stream=True, partial_images=1, extra_body=EXTRA
        )
    )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    # This scheduler takes one step more than it is asked for.
    assert kinds == [*["progress"] * 2, "partial_image", *["progress"] * 3, "completed"]
    assert [(e.step, e.steps) for e in events if hasattr(e, "step")][-1] == (5, 5)
    assert events[2].partial_image_index == 0
    assert from_base64(events[2].b64_json).shape == (32, 32, 3)
    assert difference(from_base64(events[-1].b64_json), right[0]) <= 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"size": "10000x10000"}, "size"),
        ({"size": "16384x8"}, "size"),
        ({"size": "large"}, "size"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"n": 0}, "n"),
        ({"response_format": "url"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 2}, "partial_images"),
    ],
)
def test_the_openai_client_is_told_what_is_wrong(
    client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", **change)
    assert caught.value.param == param


def test_other_models_are_not_served(images: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-sd"]
    with pytest.raises(openai.NotFoundError, match="use tiny-sd"):
        client.images.generate(prompt="a", model="dall-e-3")
    for route in ("/generate", "/generate_stream", "/v1/completions"):
        answer = images.post(route, {"prompt": "a"})
        assert answer.status_code == 404
        said = answer.json()["error"]["message"]
        assert said.endswith("has no model for text-generation, only one for text-to-image")


def test_a_picture_as_a_task(images: Server, right: list[Pixels]) -> None:
    route = "/generate_image_task"
    task = {"task_id": images.post(f"{route}/submit", ASK).json()["task_id"]}

    def status() -> str:
        answer = HTTP.get(f"{images.url}{route}/status", params=task).json()
        return str(answer["status"])

    wait_until(lambda: status() != "in_progress", 30, "the task is done")
    assert status() == "completed"
    answer = HTTP.get(f"{images.url}{route}/get", params=task)
    assert difference(opened(answer.content), right[0]) <= 1
    assert images.gauge("admitted_sequences") == 0


def test_a_task_is_refused_or_done_and_never_lost(images: Server) -> None:
    route = "/generate_image_task"
    body = ASK | {"num_images": 3, "num_inference_steps": 100}
    answers = [images.post(f"{route}/submit", body) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert int(answers[3].headers["retry-after"]) >= 1
    assert images.gauge("admitted_sequences") == 6, "of six that the queue holds"
    tasks = [{"task_id": answer.json()["task_id"]} for answer in answers[:2]]

    def statuses() -> set[str]:
        rows = [HTTP.get(f"{images.url}{route}/status", params=task).json() for task in tasks]
        return {str(row["status"]) for row in rows}

    wait_until(lambda: "in_progress" not in statuses(), 60, "the tasks are done")
    assert statuses() == {"completed"}
    wait_until(lambda: images.gauge("admitted_sequences") == 0, 2, "the places are free")
    retried = HTTP.post(f"{images.url}{route}/retry", params=tasks[0])
    assert retried.status_code == 200
    assert images.gauge("admitted_sequences") == 3
    tasks = [{"task_id": retried.json()["task_id"]}]
    wait_until(lambda: statuses() == {"completed"}, 60, "the task is done again")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        ({"prompt": "a", "num_inference_steps": 0}, 400, "num_inference_steps"),
        ({"prompt": "a", "height": 10_000, "width": 10_000}, 400, "height"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
    ],
)
def test_a_bad_task_is_refused_when_it_is_submitted(
    images: Server, body: Any, status: int, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = HTTP.post(
        f"{images.url}/generate_image_task/submit",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_task_goes_on_when_it_is_told_to_be_cancelled(images: Server) -> None:
    answer = HTTP.put(f"{images.url}/generate_image_task/cancel", params={"task_id": "x"})
    assert answer.status_code == 400
    assert "cannot be cancelled" in answer.json()["error"]["message"]


def test_a_dead_rank_fails_its_pictures_and_comes_back(images: Server) -> None:
    [rank] = ranks_below(images.pid)
    body = {"prompt": "a", "stream": True, "num_inference_steps": 200}
    url = images.url + "/v1/images/generations"
    with HTTP.stream("POST", url, json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: image_generation.progress"
        os.kill(rank.pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-2] == "event: error"
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "model_not_ready"
    failed = 'triptych_pictures_total{outcome="failed",route="/v1/images/generations"} 1.0'
    assert failed in images.metrics().splitlines()
    images.wait_ready()
    assert images.post("/generate_image", ASK).status_code == 200


def test_beside_a_text_model(
    image_model: Path, text_model: Path, bentoml_home: Path, right: list[Pixels]
) -> None:
    variables = {
        "TRIPTYCH_TEXT_MODEL": str(text_model),
        "TRIPTYCH_IMAGE_MODEL": str(image_model),
        "TRIPTYCH_API_KEY": "key",
    }
    with Server(bentoml_home, variables) as server:
        assert server.post("/generate_image", ASK).status_code == 401
        key = {"Authorization": "Bearer key"}
        answer = server.post("/generate_image", ASK, **key)
        assert difference(opened(answer.content), right[0]) <= 1
        text = server.post("/generate", {"prompt": "hello", "max_new_tokens": 3}, **key).json()
        assert text["outputs"][0]["generated_length"] == 3
        models = HTTP.get(server.url + "/v1/models", headers=key).json()["data"]
        assert [model["id"] for model in models] == ["tiny-llama", "tiny-sd"]
        assert (
            server.post("/generate", {"prompt": "a", "model": "tiny-sd"}, **key).status_code == 404
        )
