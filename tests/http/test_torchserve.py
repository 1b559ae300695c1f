"""TorchServe's archives, imported and served: the calls their clients made are answered."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo_models.image.build import write_demo_image_model
from demo_models.text.build import write_demo_text_model
from tests.support.archives import (
    MII_OF_THE_REPOSITORY,
    accelerate_archive,
    deepspeed_archive,
    mii_archive,
)
from tests.support.models import greedy, write_model
from tests.support.readme import Example, guide
from tests.support.server import HTTP, ROOT, Server, environment, metric

PROMPT = "Once upon a time in Porto Lume, Fenna the fox"
PICTURE = {"data": "a red circle", "num_inference_steps": 2, "seed": 3}
IMPORTS, SERVE, CALLS = guide("torchserve.md")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A folder with what somebody has who comes from TorchServe."""
    folder = tmp_path_factory.mktemp("torchserve")
    (folder / "input.txt").write_text(PROMPT)
    write_demo_text_model(folder / "text")
    write_demo_image_model(folder / "image")
    for made in (
        accelerate_archive(folder / "bloom", folder / "text"),
        deepspeed_archive(folder / "opt", llama),
        mii_archive(folder / "stable-diffusion", folder / "image", MII_OF_THE_REPOSITORY),
    ):
        made.rename(folder / made.name)
    return folder


@pytest.fixture(scope="module")
def home(work: Path) -> Path:
    """A model store into which the guide's commands have imported the archives."""
    folder = work / "home"
    folder.mkdir()
    for example in IMPORTS:
        example.check(url="", cwd=work, env=environment(folder))
    return folder


@pytest.fixture(scope="module")
def bloom(home: Path) -> Iterator[Server]:
    """Accelerate's and MII's archives, served as the guide says; at first they still load."""
    server = Server(home, SERVE.variables).start()
    try:
        yield server
    finally:
        server.stop()
    server.assert_clean_log()


@pytest.fixture(scope="module")
def ready(bloom: Server) -> Server:
    return bloom.wait_ready()


@pytest.fixture(scope="module")
def opt(work: Path, home: Path) -> Iterator[Server]:
    """DeepSpeed's archive, whose model is split over two ranks."""
    command = [sys.executable, "-m", "model_store_scripts.import_archive", "opt.tar.gz"]
    env = environment(home, PYTHONPATH=str(ROOT))
    subprocess.run(command, cwd=work, env=env, check=True)
    with Server(home, {"TRIPTYCH_TEXT_MODEL": "opt"}) as running:
        yield running


@pytest.fixture(scope="module")
def answer(ready: Server) -> str:
    """What any call for text is answered."""
    return expected(ready)


def curl(server: Server, path: str, *options: str, cwd: Path) -> tuple[int, str, bytes]:
    """Status, Content-Type and body of what the real curl is answered."""
    form = "\n%{http_code} %{content_type}"
    command = ["curl", "--silent", "--max-time", "60", "--write-out", form, *options]
    done = subprocess.run([*command, server.url + path], cwd=cwd, capture_output=True, check=True)
    body, _, told = done.stdout.rpartition(b"\n")
    status, _, kind = told.decode().partition(" ")
    return int(status), kind, body


def error(server: Server, path: str, *options: str, cwd: Path) -> tuple[int, str, str]:
    """Code, type and message of an error."""
    status, kind, body = curl(server, path, *options, cwd=cwd)
    told = json.loads(body)
    assert list(told) == ["code", "type", "message"]
    assert (kind, told["code"]) == ("application/json", status)
    return status, told["type"], told["message"]


def expected(server: Server, **options: object) -> str:
    """The prompt and what the native API says that follows it."""
    answer = server.post("/generate", {"prompt": PROMPT, **options})
    text: str = answer.json()["outputs"][0]["generated_text"]
    return PROMPT + text


def test_while_the_models_load(bloom: Server, work: Path) -> None:
    """First of all: the server listens before its models are there."""
    while bloom.readiness()[0] == 0:
        pass
    assert curl(bloom, "/ping", cwd=work)[0] == 200
    status, kind, message = error(bloom, "/predictions/bloom", "-T", "input.txt", cwd=work)
    assert (status, kind) == (503, "ServiceUnavailableException")
    assert "model bloom is not ready" in message
    [state] = json.loads(curl(bloom, "/models/bloom", cwd=work)[2])
    assert state["workers"] == [{"id": "0", "status": "UNLOADING", "gpu": False}]


TEXT_CALLS = [
    ("-T", "input.txt"),
    ("-X", "POST", "-T", "input.txt"),
    ("-X", "POST", "-H", "Content-Type: text/plain", "--data-binary", "@input.txt"),
    ("-H", "Content-Type: application/octet-stream", "--data-binary", "@input.txt"),
    ("-F", "data=@input.txt"),
    ("-F", f"body={PROMPT}", "-F", "user=somebody"),
    ("--data-urlencode", f"data={PROMPT}"),
    *(
        ("-H", "Content-Type: application/json", "-d", json.dumps(body))
        for body in (
            *(PROMPT, {"data": None, "body": PROMPT, "prompt": None}),
            *({key: PROMPT} for key in ("data", "body", "inputs", "prompt")),
        )
    ),
]


@pytest.mark.parametrize("call", TEXT_CALLS, ids=" ".join)
def test_a_text_in_any_body(call: tuple[str, ...], ready: Server, answer: str, work: Path) -> None:
    want = (200, "text/plain; charset=utf-8", answer.encode())
    assert curl(ready, "/predictions/bloom", *call, cwd=work) == want


def test_the_same_with_options_version_and_other_case(ready: Server, work: Path) -> None:
    options = {"max_new_tokens": 5, "temperature": 0.8, "seed": 4, "ignore_eos": True}
    body = json.dumps({"data": PROMPT, **options})
    call = ("-H", "Content-Type: application/json", "-d", body)
    answers = {
        curl(ready, f"/predictions/{path}", *call, cwd=work)[2].decode()
        for path in ("bloom", "bloom/", "bloom/1.0", "bloom/1.0/", "Bloom")
    }
    assert answers == {expected(ready, **options)}


def test_a_model_split_over_ranks(opt: Server, llama: Path, work: Path) -> None:
    status, _, body = curl(opt, "/predictions/opt", "-T", "input.txt", cwd=work)
    assert status == 200
    ids = greedy(llama, [PROMPT], 50, dtype="float16")[0]
    ids = ids[: ids.index(1)] if 1 in ids else ids
    answer = opt.post("/detokenize", {"tokens": ids, "skip_special_tokens": True})
    assert body.decode() == PROMPT + answer.json()["text"], (
        "model.generate's, as max_new_tokens has"
    )
    [state] = opt.get("/models/opt/all").json()
    assert (state["modelVersion"], state["workers"][0]["status"]) == ("1.0", "READY")
    assert state["responseTimeout"] == 120


def test_a_picture_as_the_examples_client_reads_it(ready: Server, work: Path) -> None:
    """Its `query.py` posts the prompt as it is, and makes an image of the lists that come."""
    answer = HTTP.post(ready.url + "/predictions/stable-diffusion", content="a red circle")
    image = Image.fromarray(np.array(json.loads(answer.text), dtype="uint8"))
    assert (image.size, image.mode) == ((64, 64), "RGB")
    seed = int(answer.headers["x-seed"])
    sampling = MII_OF_THE_REPOSITORY["model_config"]
    assert isinstance(sampling, dict)
    body = json.dumps({"data": "a red circle", "seed": seed, **sampling})
    call = ("-H", "Content-Type: application/json", "-d", body, "-H", "Accept: image/png")
    status, kind, content = curl(ready, "/predictions/stable-diffusion", *call, cwd=work)
    assert (status, kind) == (200, "image/png")
    assert Image.open(io.BytesIO(content)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/json, image/png", "image/png"),
        ("image/*", "image/png"),
        ("IMAGE/JPEG;q=0.8", "image/jpeg"),
        ("image/webp,image/png", "image/webp"),
        ("image/tiff", "application/json"),
    ],
)
def test_the_kinds_of_picture(accept: str, kind: str, ready: Server) -> None:
    answer = HTTP.post(
        ready.url + "/predictions/stable-diffusion", json=PICTURE, headers={"Accept": accept}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert answer.headers["x-seed"] == "3"


def test_ping_and_models(ready: Server, work: Path) -> None:
    assert curl(ready, "/ping", cwd=work) == (
        200,
        "application/json",
        b'{\n  "status": "Healthy"\n}\n',
    )
    assert ready.get("/models").json() == {
        "models": [
            {"modelName": "bloom", "modelUrl": "bloom"},
            {"modelName": "stable-diffusion", "modelUrl": "stable-diffusion"},
        ]
    }
    [state] = ready.get("/models/bloom/1.0").json()
    assert state == {
        "modelName": "bloom",
        "modelVersion": "1.0",
        "modelUrl": "bloom",
        "runtime": "python",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 32,
        "maxBatchDelay": 0,
        "responseTimeout": 300,
        "loadedAtStartup": True,
        "workers": [{"id": "0", "status": "READY", "gpu": False}],
        "jobQueueStatus": {"remainingCapacity": 256, "pendingRequests": 0},
    }
    assert ready.get("/models/stable-diffusion").json()[0]["batchSize"] == 8
    for path in ("/ping", "/models", "/models/bloom/1.0"):
        assert ready.get(f"{path}/").text == ready.get(path).text
    assert HTTP.head(ready.url + "/ping").status_code == 200
    assert HTTP.get(ready.url + "/predictions/bloom").headers["allow"] == "POST, PUT"


JSON = ("-H", "Content-Type: application/json", "-d")
BY_POST_OR_PUT = "/predictions/bloom takes POST or PUT, not GET"


@pytest.mark.parametrize(
    ("path", "options", "want"),
    [
        (
            "/predictions/nope",
            ("-T", "input.txt"),
            (404, "ModelNotFoundException", "Model not fou"),
        ),
        ("/models/nope", (), (404, "ModelNotFoundException", "Model not found: nope")),
        (
            "/predictions/bloom/2.0",
            ("-T", "input.txt"),
            (
                404,
                "ModelVersionNotFoundException",
                "Model version: 2.0 does not exist for model: b",
            ),
        ),
        ("/models/bloom/2.0", (), (404, "ModelVersionNotFoundException", "Model version: 2.0")),
        (
            "/predictions",
            ("-T", "input.txt"),
            (404, "ResourceNotFoundException", "there is no PUT"),
        ),
        ("/predictions/bloom", (), (405, "MethodNotAllowedException", BY_POST_OR_PUT)),
        ("/predictions/bloom/1.0", (), (405, "MethodNotAllowedException", "/predictions/bloom/1")),
        ("/models", ("-X", "POST"), (405, "MethodNotAllowedException", "/models takes GET, not")),
        ("/predictions/bloom", ("-d", ""), (400, "BadRequestException", "the form has neither")),
        (
            "/predictions/bloom",
            ("-d", PROMPT),
            (400, "BadRequestException", "the form has neither"),
        ),
        (
            "/predictions/bloom",
            ("-H", "Content-Type: multipart/form-data", "-d", "x"),
            (400, "BadRequestException", "the form cannot be read"),
        ),
        (
            "/predictions/bloom",
            ("-H", "Content-Type: text/plain", "-d", ""),
            (400, "BadRequestException", "the input must be a text that is not empty"),
        ),
        (
            "/predictions/bloom",
            ("-H", "Content-Type: text/plain", "--data-binary", "@latin"),
            (400, "BadRequestException", "the input must be UTF-8"),
        ),
        ("/predictions/bloom", (*JSON, "{"), (400, "BadRequestException", "the body is not JSON")),
        (
            "/predictions/bloom",
            (*JSON, "[1]"),
            (400, "BadRequestException", "the body must be a t"),
        ),
        (
            "/predictions/bloom",
            (*JSON, "{}"),
            (400, "BadRequestException", "the body must have exactly one"),
        ),
        (
            "/predictions/bloom",
            (*JSON, '{"data": null}'),
            (400, "BadRequestException", "the body must have exactly one"),
        ),
        (
            "/predictions/bloom",
            (*JSON, '{"data": "a", "body": "b"}'),
            (
                400,
                "BadRequestException",
                "the body must have exactly one of data, body, inputs, prompt",
            ),
        ),
        (
            "/predictions/bloom",
            (*JSON, '{"data": ["a"]}'),
            (400, "BadRequestException", "the input must be a text that is not empty"),
        ),
        (
            "/predictions/bloom",
            (*JSON, '{"data": "a", "max_tokens": 1}'),
            (400, "BadRequestException", "max_tokens: is not a known field"),
        ),
        (
            "/predictions/bloom",
            (*JSON, '{"data": "a", "max_new_tokens": 100000}'),
            (400, "BadRequestException", ""),
        ),
        (
            *("/predictions/stable-diffusion", (*JSON, '{"data": "a", "num_inference_steps": 0}')),
            (400, "BadRequestException", "num_inference_steps: Input should be greater"),
        ),
    ],
)
def test_errors(
    path: str, options: tuple[str, ...], want: tuple[int, str, str], ready: Server, work: Path
) -> None:
    (work / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    status, kind, message = error(ready, path, *options, cwd=work)
    assert (status, kind) == want[:2]
    assert message.startswith(want[2])


@pytest.mark.parametrize(
    "path", ["/invocations", "/bloom/predict", "/explanations/bloom", "/explanations/bloom/1.0"]
)
def test_routes_that_are_not_offered(path: str, ready: Server) -> None:
    """Whatever the body's type, that is what is wrong with the request."""
    answer = HTTP.post(ready.url + path, content="a", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/models?url=bloom.mar", 405),
        ("PUT", "/models/bloom?min_worker=2", 405),
        ("DELETE", "/models/bloom/1.0", 405),
        ("PUT", "/models/bloom/1.0/set-default", 404),
        ("OPTIONS", "/", 405),
    ],
)
def test_management_that_is_not_offered(method: str, path: str, status: int, ready: Server) -> None:
    assert HTTP.request(method, ready.url + path).status_code == status


@pytest.mark.parametrize("example", CALLS, ids=lambda e: e.code.splitlines()[-1][:40])
def test_the_guide(example: Example, ready: Server, work: Path, home: Path) -> None:
    example.check(url=ready.url, cwd=work, env=environment(home))


def test_it_is_counted_and_documented(ready: Server, work: Path) -> None:
    def counted(**labels: str) -> float:
        return metric(ready.metrics(), "requests_total", **labels)

    before = counted(route="/predictions", status="200"), counted(route="/models", status="404")
    curl(ready, "/predictions/bloom/1.0", "-T", "input.txt", cwd=work)
    curl(ready, "/models/nope", cwd=work)
    after = counted(route="/predictions", status="200"), counted(route="/models", status="404")
    assert after == (before[0] + 1, before[1] + 1)
    assert metric(ready.metrics(), "generated_tokens_total", route="/predictions") > 0
    documented: dict[str, Any] = ready.get("/docs.json").json()["paths"]
    for path in ("/predictions/{model_name}", "/predictions/{model_name}/{version}", "/ping"):
        assert path in documented
    assert "Duplicate Operation ID" not in ready.log
