"""`/docs.json` is valid, describes every route, and no request gets an answer that it lacks."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from starlette.datastructures import State
from starlette.routing import BaseRoute, Mount, Route
from starlette.testclient import TestClient

from api.document import OPERATIONS, openapi
from api.http.admission import Admission
from api.http.error_formats import OPENAI, TORCHSERVE
from api.http.openapi import Operation
from api.models.served import ServedModels
from api.models.tasks import TaskModel
from runners.contracts.errors import (
    ContentFiltered,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    RunnerUnavailable,
    TriptychError,
)
from runners.contracts.tasks import PIPELINE_TASKS
from tests.support.fake_models import FakeChatRunner, FakeImageRunner, FakeTaskRunner
from tests.support.service import serving

EXAMPLES = 3
PIPELINES = [f"/tasks/{task}" for task in PIPELINE_TASKS]
ERRORS: list[type[TriptychError]] = [
    InvalidRequest,
    ContextLengthExceeded,
    ModelNotServed,
    Overloaded,
    EngineFailure,
    RunnerUnavailable,
    DeadlineExceeded,
]
"""What a model may answer."""
BODIES: dict[str, Any] = {
    "/generate": {"prompt": "a"},
    "/generate_stream": {"prompt": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
    "/generate_image": {"prompt": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/images/generations": {"prompt": "a"},
    "/tasks/conversational": {"text": "a"},
    "/predictions/{model_name}": "a",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of a service with a text model and an image model."""
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, text=FakeChatRunner(), image=FakeImageRunner()) as made:
        yield made


@pytest.fixture(scope="module")
def known(client: TestClient) -> dict[str, str]:
    """Values of the parameters of paths and queries."""
    job = client.post("/generate_image_task/submit", json={"prompt": "a"}).json()["task_id"]
    return {"model_name": "fake", "model_id": "fake", "version": "1", "task_id": job}


def test_it_is_valid() -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator  # as below

    document = json.loads(openapi())
    assert document["openapi"].startswith("3.1")
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    assert len({operation.name for operation in OPERATIONS}) == len(OPERATIONS)


def test_it_is_made_once(client: TestClient) -> None:
    answer = client.get("/docs.json")
    assert answer.content == openapi()
    assert answer.headers["content-type"] == "application/json"
    assert openapi() is openapi()


def routes_of(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The method and the path of each route; whatever takes GET takes HEAD."""
    for route in routes:
        if isinstance(route, Mount):
            yield from routes_of(route.routes, prefix + route.path)
        elif isinstance(route, Route):
            path = re.sub(r":\w+}", "}", prefix + route.path)
            methods = (route.methods or set()) - {"HEAD"}
            yield from ((method.lower(), path) for method in methods)


def test_each_route_is_described_and_each_description_has_its_route(client: TestClient) -> None:
    app: Any = client.app
    in_document = {(operation.method, operation.path) for operation in OPERATIONS}
    assert in_document == set(routes_of(app.routes))


def described() -> Iterator[object]:
    """The operations that the models of `client` serve."""
    for operation in OPERATIONS:
        if operation.path not in PIPELINES:
            yield pytest.param(operation, id=operation.name)


@pytest.mark.parametrize("operation", list(described()))
def test_answers_are_those_that_it_describes(
    checks: Any, client: TestClient, known: dict[str, str], operation: Operation
) -> None:
    counts = checks.statuses(operation, client, known, EXAMPLES, body=BODIES.get(operation.path))
    if 200 in operation.answers:
        assert counts[200]
    if operation.body:
        assert counts[400]


@pytest.mark.parametrize("path", PIPELINES)
def test_answers_of_tasks_are_those_that_it_describes(
    checks: Any, client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    [operation] = (operation for operation in OPERATIONS if operation.path == path)
    model = TaskModel(FakeTaskRunner(path.rpartition("/")[2]), Admission(128))
    app = importlib.import_module("service").mounted_app
    monkeypatch.setattr(app, "state", State({"served": ServedModels(task_model=model)}))
    counts = checks.statuses(operation, client, {}, EXAMPLES)
    assert counts[200]
    assert counts[400]


@pytest.mark.parametrize("path", BODIES)
def test_errors_are_those_that_it_describes(
    checks: Any, client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    makes_images = "image" in path
    media_type = "text/plain" if path.startswith("/predictions") else "application/json"
    errors = TORCHSERVE if path.startswith("/predictions") else OPENAI
    case = checks.SCHEMA[path]["post"].Case(
        path_parameters={"model_name": "fake"}, body=BODIES[path], media_type=media_type
    )
    assert checks.check(client, case) == 200
    for cls in [*ERRORS, *([ContentFiltered] if makes_images else [])]:

        async def fail(*_: object, cls: type[TriptychError] = cls, **__: object) -> None:
            raise cls("broke")

        for name in ("submit", "tokenize", "detokenize"):
            monkeypatch.setattr(FakeChatRunner, name, fail)
        monkeypatch.setattr(FakeImageRunner, "submit", fail)
        assert checks.check(client, case, may_fail=True) == errors.statuses[cls].status
