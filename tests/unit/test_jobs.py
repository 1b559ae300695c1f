"""Jobs: admitted once when they are submitted, and their results are bounded."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
from _bentoml_impl.tasks import (  # type: ignore[import-untyped]
    ResultStatus,
    Sqlite3Store,
    result,
)
from _bentoml_impl.tasks.serde import JSONSerde  # type: ignore[import-untyped]
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.admission import Admission
from api.http.async_tasks import (
    RESULT_STORE,
    JobMiddleware,
    JobResults,
    ResultSerde,
    choose_result_store,
    forget_lost_jobs,
)
from api.http.context import current_request
from api.http.json_pieces import Base64, json_response
from api.http.middleware import BodyMiddleware, RequestContextMiddleware
from api.models.images import ImageModel
from api.models.served import ServedModels
from api.native.images import GenerateImageRequest, admit_image_request, generate_image
from runners.contracts.images import (
    MAX_PIXELS,
    ImageEvent,
    ImageModelInfo,
    ImageRequest,
    ImageRunner,
    RawImage,
)
from runners.contracts.runner import RunnerHealth, RunnerState
from tests.support.fake_models import IMAGE_INFO

ROUTE = "/generate_image_task"
INFO = msgspec.structs.replace(IMAGE_INFO, max_pixels=64, max_inference_steps=1)
ROUTED = Starlette(
    routes=[
        Route(f"{ROUTE}/{name}", lambda _: Response(), methods=["POST"])
        for name in ("submit", "retry", "cancel")
    ]
)
"""The app whose routes tell which requests have a use for a body."""


class FakeImageRunner:
    """Finishes every image once `finish` is set."""

    name = "fake"

    def __init__(self, info: ImageModelInfo = INFO) -> None:
        self.info = info
        self.finish = asyncio.Event()

    def health(self) -> RunnerHealth:
        return RunnerHealth(state=RunnerState.READY, detail="fake")

    async def submit(self, request: ImageRequest) -> FakeImageStream:
        return FakeImageStream(self.finish, request)


class FakeImageStream:
    def __init__(self, finish: asyncio.Event, request: ImageRequest) -> None:
        self._finish = finish
        self._request = request

    async def __aiter__(self) -> AsyncIterator[ImageEvent]:
        await self._finish.wait()
        image = RawImage(width=8, height=8, data=bytes(192))
        yield ImageEvent(request_id=self._request.request_id, step=1, steps=1, image=image)

    async def aclose(self) -> None:
        pass


class Jobs:
    """An app that answers a submission and then runs the job, as BentoML's does."""

    def __init__(self, runner: FakeImageRunner, admission: Admission) -> None:
        self.served = ServedModels(image_model=ImageModel(cast(ImageRunner, runner), admission))
        self.results: list[Response | Exception] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = GenerateImageRequest.parse((await receive())["body"])
        await asyncio.sleep(0.01)  # others are submitted while the job is stored
        await Response("{}")(scope, receive, send)
        current_request().timeout = 60.0
        try:
            result = await generate_image(self.served, body)
            self.results.append(cast(Response, result))
        except Exception as error:
            self.results.append(error)

    def app(self, database: Path) -> ASGIApp:
        jobs = JobMiddleware(
            self,
            route=ROUTE,
            admit=lambda body: admit_image_request(self.served, body),
            max_result_bytes=1000,
            timeout=60.0,
        )
        return RequestContextMiddleware(BodyMiddleware(jobs, max_bytes=1000), timeout=60.0)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "results.db"
    Sqlite3Store.init_db(str(path))
    monkeypatch.setenv(RESULT_STORE, str(path))
    return path


class Call:
    """One request to an app, which goes on after its answer."""

    def __init__(self, app: ASGIApp, path: str, content: object = None, query: str = "") -> None:
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": query.encode(),
            "headers": [],
            "app": ROUTED,
        }
        body = json.dumps(content).encode()
        self._messages: list[Message] = [{"type": "http.request", "body": body}]
        self.sent: list[Message] = []
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop()

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def status(self) -> int:
        while not self.sent:
            await asyncio.sleep(0.001)
        return int(self.sent[0]["status"])


async def test_every_job_that_is_accepted_is_done(database: Path) -> None:
    runner, admission = FakeImageRunner(), Admission(6, "images")
    jobs = Jobs(runner, admission)
    app = jobs.app(database)
    calls = [Call(app, f"{ROUTE}/submit", {"prompt": "a", "num_images": 2}) for _ in range(9)]
    statuses = [await call.status() for call in calls]
    assert sorted(statuses) == [200] * 3 + [429] * 6
    assert admission.admitted == 6
    refused = next(call for call in calls if call.sent[0]["status"] == 429)
    assert (b"retry-after", b"1") in refused.sent[0]["headers"]
    runner.finish.set()
    await asyncio.gather(*(call.task for call in calls))
    assert len(jobs.results) == 3
    assert not [result for result in jobs.results if isinstance(result, Exception)]
    assert admission.admitted == 0


async def test_a_retry_needs_a_place_too(database: Path) -> None:
    body = json.dumps({"prompt": "a", "num_images": 3}).encode()
    job_id = await store(database, body, "result")
    runner, admission = FakeImageRunner(), Admission(4, "images")
    app = Jobs(runner, admission).app(database)
    running = Call(app, f"{ROUTE}/submit", {"prompt": "a", "num_images": 2})
    assert await running.status() == 200
    retry = Call(app, f"{ROUTE}/retry", {"prompt": "a"}, f"task_id={job_id}")
    assert await retry.status() == 429
    assert await Call(app, f"{ROUTE}/retry", {"prompt": "a"}, "task_id=x").status() == 200, (
        "what is unknown is left to BentoML"
    )
    runner.finish.set()
    await running.task


def request_of(body: bytes) -> Request:
    """A request as BentoML stores it."""
    request = Request({"type": "http", "headers": []})
    request._body = body
    return request


async def store(database: Path, body: bytes, result: str | None) -> str:
    """Add a job as BentoML does; None: it still runs."""
    async with Sqlite3Store(str(database)) as jobs:
        job_id: str = await jobs.new_entry("generate_image_task", request_of(body))
        if result is not None:
            await jobs.set_result(job_id, Response(result), ResultStatus.COMPLETED)
    return job_id


async def test_a_job_s_input_is_found(database: Path) -> None:
    job_id = await store(database, b"input", None)
    assert JobResults(str(database)).input_of(job_id) == b"input"
    assert JobResults(str(database)).input_of("x") is None


@pytest.mark.parametrize(("max_bytes", "kept"), [(1, 1), (2500, 2), (4500, 3), (10**6, 5)])
async def test_the_newest_results_are_kept_within_the_limit(
    database: Path, max_bytes: int, kept: int
) -> None:
    running = await store(database, b"", None)
    ended = [await store(database, b"", "x" * 1500) for _ in range(5)]  # 2,100 bytes each
    JobResults(str(database)).prune(max_bytes, 60.0)
    with sqlite3.connect(database) as connection:
        left = [row[0] for row in connection.execute("SELECT task_id FROM result ORDER BY rowid")]
    connection.close()
    assert left == [running, *ended[5 - kept :]]


async def test_results_are_pruned_when_a_job_ends(database: Path) -> None:
    old = [await store(database, b"", "x" * 1500) for _ in range(3)]
    runner = FakeImageRunner()
    runner.finish.set()
    await Call(Jobs(runner, Admission(1)).app(database), f"{ROUTE}/submit", {"prompt": "a"}).task
    results = JobResults(str(database))
    assert [results.input_of(job_id) is not None for job_id in old] == [False, False, True]


async def test_jobs_that_were_lost_with_their_worker_are_forgotten(database: Path) -> None:
    old, new = [await store(database, b"input", None) for _ in range(2)]
    ended = await store(database, b"input", "x")
    with sqlite3.connect(database) as connection:
        connection.execute(
            "UPDATE result SET executed_at = datetime('now', '-2 hours') WHERE task_id = ?", [old]
        )
    connection.close()

    def known() -> list[bool]:
        results = JobResults(str(database))
        return [results.input_of(job_id) is not None for job_id in (old, new, ended)]

    JobResults(str(database)).prune(10**6, 7201.0)
    assert known() == [True, True, True]
    JobResults(str(database)).prune(10**6, 7199.0)
    assert known() == [False, True, True]
    forget_lost_jobs()
    assert known() == [False, False, True]


def test_a_new_database_has_no_lost_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESULT_STORE, str(tmp_path / "new.db"))
    forget_lost_jobs()


async def test_a_result_that_bentoml_stored_is_read(database: Path) -> None:
    async with Sqlite3Store(str(database), JSONSerde()) as jobs:
        job_id = await jobs.new_entry("generate_image_task", request_of(b""))
        await jobs.set_result(job_id, Response("x", 201), ResultStatus.COMPLETED)
    async with Sqlite3Store(str(database), ResultSerde()) as jobs:
        answer = (await jobs.get(job_id)).result
    assert (answer.status_code, answer.body) == (201, b"x")


async def test_the_pixels_of_all_images_together_are_bounded(database: Path) -> None:
    runner = FakeImageRunner(msgspec.structs.replace(INFO, max_pixels=MAX_PIXELS))
    runner.finish.set()
    app = Jobs(runner, Admission(10)).app(database)
    body = {"prompt": "a", "width": 4096, "height": 8192, "response_format": "numpy"}
    assert await Call(app, f"{ROUTE}/submit", body | {"num_images": 2}).status() == 200
    refused = Call(app, f"{ROUTE}/submit", body | {"num_images": 3})
    assert await refused.status() == 400
    error = json.loads(refused.sent[1]["body"])["error"]
    assert error["param"] == "height"
    assert "3 images of 4096x8192 have more than 67108864 pixels" in error["message"]


@pytest.mark.parametrize("size", [5, 300_000])
async def test_a_result_is_stored_as_it_is(database: Path, size: int) -> None:
    class File(BaseModel):
        content: Base64

    answer = json_response(File(content=b"x" * size))
    answer.headers["X-Seed"] = "\xe9"
    async with Sqlite3Store(str(database), ResultSerde()) as jobs:
        job_id = await jobs.new_entry("generate_image_task", request_of(b""))
        await jobs.set_result(job_id, answer, ResultStatus.COMPLETED)
        row = await jobs.get(job_id)
    assert row.result.status_code == 200
    assert row.result.headers.items() == answer.headers.items()
    assert json.loads(row.result.body) == {"content": base64.b64encode(b"x" * size).decode()}
    assert row.result.body.count(b"\n") == 0


async def test_bentoml_stores_results_so(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "JSONSerde", None)
    choose_result_store()
    async with Sqlite3Store(str(database)) as jobs:
        assert isinstance(jobs.serializer, ResultSerde)
