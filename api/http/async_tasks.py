"""BentoML's async tasks, called jobs here: where their results are, and which ones are accepted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing

from _bentoml_impl.tasks import result  # type: ignore[import-untyped]
from _bentoml_impl.tasks.serde import (  # type: ignore[import-untyped]
    JSONSerde,
    _consume_response,
)
from starlette.datastructures import QueryParams
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

from api.http.errors import error_response
from runners.contracts.errors import InvalidRequest
from runners.protocol.folders import process_folder

RESULT_STORE = "BENTOML_RESULT_STORE"
"""The environment variable that names the database of results."""
LOST_AFTER_S = 60.0
"""Seconds beyond its timeout after which a job without a result is lost."""


def choose_result_store() -> None:
    """Name a database in this process's private folder, unless the operator named one.

    BentoML's default is one database in its home, which each server deletes when it starts: of two
    servers with one home, the older would lose its jobs. The worker of a server inherits the
    variable, so it uses the same database. Raises: OSError.
    """
    result.JSONSerde = ResultSerde  # the store has no option for it
    if RESULT_STORE not in os.environ:
        os.environ[RESULT_STORE] = str(process_folder() / "results.db")


class ResultSerde(JSONSerde):  # type: ignore[misc]  # bentoml's is Any
    """Stores the content of a result as it is.

    BentoML puts it into JSON, in base64: for 20 MB the event loop is blocked for 0.2 s.
    """

    @override
    async def serialize_response(self, response: Response) -> bytes:
        content = await _consume_response(response)
        head = self.json_encode([response.status_code, response.raw_headers])
        return b"\n".join([head, content])

    @override
    async def deserialize_response(self, data: bytes) -> Response:
        head, _, content = data.partition(b"\n")
        stored = json.loads(head)
        if isinstance(stored, dict):  # by BentoML, in a file that outlives a release
            return await super().deserialize_response(data)  # type: ignore[no-any-return]
        status, headers = stored
        response = Response(content, status)
        response.raw_headers = [
            (name.encode(self.HEADERS_ENCODING), value.encode(self.HEADERS_ENCODING))
            for name, value in headers
        ]
        return response


class JobResults:
    """BentoML's database of jobs: their inputs, and the results of those that have ended."""

    def __init__(self, database: str) -> None:
        self._database = database

    def input_of(self, job_id: str) -> bytes | None:
        """The body that a job was submitted with; None for an unknown job."""
        with self._connect() as connection:
            rows = connection.execute("SELECT input FROM result WHERE task_id = ?", [job_id])
            row = rows.fetchone()
        return None if row is None else base64.b64decode(json.loads(row[0])["content"])

    def prune(self, max_bytes: int, max_age_s: float) -> None:
        """Delete the jobs that ended first, until what the others have is less than `max_bytes`.

        The job that ended last is kept. The file does not shrink, but its space is used again. Jobs
        that have run for longer than `max_age_s` were lost with their process: they are deleted.
        """
        with self._connect() as connection:
            connection.execute(_PRUNE, [max_bytes])
            connection.execute(_PRUNE_LOST, [f"-{max_age_s} seconds"])
            connection.commit()

    def forget_unfinished(self) -> None:
        """Delete the jobs that have not ended: those of the worker that this one replaces."""
        with self._connect() as connection:
            connection.execute("DELETE FROM result WHERE completed_at IS NULL")
            connection.commit()

    def _connect(self) -> AbstractContextManager[sqlite3.Connection]:
        return closing(sqlite3.connect(self._database, timeout=30))


_PRUNE = """
DELETE FROM result WHERE task_id IN (
    SELECT task_id FROM (
        SELECT task_id, SUM(LENGTH(input) + LENGTH(result)) OVER (
            ORDER BY completed_at DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS newer_bytes FROM result WHERE completed_at IS NOT NULL
    ) WHERE newer_bytes >= ?
)
"""
_PRUNE_LOST = """
DELETE FROM result WHERE completed_at IS NULL AND datetime(executed_at) < datetime('now', ?)
"""


def forget_lost_jobs() -> None:
    """Delete the jobs of an earlier worker, in the only worker of a server."""
    if (database := os.environ.get(RESULT_STORE)) is not None:
        with contextlib.suppress(sqlite3.OperationalError):  # there is no table yet
            JobResults(database).forget_unfinished()


class JobMiddleware:
    """Admits jobs when they are submitted, refuses to cancel one, and bounds their results.

    `timeout`: of a job, in seconds.

    BentoML accepts any job and reports its error with the result. It marks a job as cancelled, but
    does not stop it. It runs a job after it has answered, in the same call of the app: the job's
    place in the queue is one of the resources of the request that submits it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        route: str,
        admit: Callable[[bytes], None],
        max_result_bytes: int,
        timeout: float,
    ) -> None:
        self.app = app
        self.route = route
        self.admit = admit
        self.max_result_bytes = max_result_bytes
        self.timeout = timeout
        self._results = JobResults(os.environ[RESULT_STORE])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; `BodyMiddleware` has read its body."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path == f"{self.route}/cancel":
            error = InvalidRequest("a submitted job cannot be cancelled")
            return await error_response(error)(scope, receive, send)
        if path in (f"{self.route}/submit", f"{self.route}/retry") and scope["method"] == "POST":
            return await self._start(scope, receive, send, is_retry=path.endswith("/retry"))
        return await self.app(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send, *, is_retry: bool) -> None:
        """Answer a submission or a retry, and wait until its job has ended."""
        pending: list[Message] = [await receive()]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        try:
            body: bytes | None = pending[0].get("body", b"")
            if is_retry:
                job_id = QueryParams(scope["query_string"]).get("task_id", "")
                body = await asyncio.to_thread(self._results.input_of, job_id)
            if body is not None:
                self.admit(body)
        except Exception as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self.app(scope, replay, send)
        finally:
            max_age_s = self.timeout + LOST_AFTER_S
            await asyncio.to_thread(self._results.prune, self.max_result_bytes, max_age_s)
