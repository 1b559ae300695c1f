"""BentoML's async tasks, called jobs here: where their results are, and which ones are accepted."""

from __future__ import annotations

import os
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.errors import error_response
from runners.contracts.errors import InvalidRequest
from runners.protocol.folders import process_folder

RESULT_STORE = "BENTOML_RESULT_STORE"
"""The environment variable that names the database of results."""


def choose_result_store() -> None:
    """Name a database in this process's private folder, unless the operator named one.

    BentoML's default is one database in its home, which each server deletes when it starts: of two
    servers with one home, the older would lose its jobs. The worker of a server inherits the
    variable, so it uses the same database. Raises: OSError.
    """
    if RESULT_STORE not in os.environ:
        os.environ[RESULT_STORE] = str(process_folder() / "results.db")


class JobMiddleware:
    """Refuses invalid jobs when they are submitted, and refuses to cancel one.

    BentoML accepts any job and reports its error with the result. It marks a job as cancelled, but
    does not stop it.
    """

    def __init__(self, app: ASGIApp, *, route: str, check: Callable[[bytes], None]) -> None:
        self.app = app
        self.route = route
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; `BodyMiddleware` has read its body."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path == f"{self.route}/cancel":
            error = InvalidRequest("a submitted job cannot be cancelled")
            return await error_response(error)(scope, receive, send)
        if path != f"{self.route}/submit" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        pending: list[Message] = [await receive()]
        try:
            self.check(pending[0].get("body", b""))
        except Exception as error:
            return await error_response(error)(scope, receive, send)

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return await self.app(scope, replay, send)
