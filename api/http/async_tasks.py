"""BentoML's async tasks, called jobs here: where their results are, and which ones are accepted."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.errors import error_response
from runners.contracts.errors import InvalidRequest

RESULT_STORE = "BENTOML_RESULT_STORE"
"""The environment variable that names the database of results."""
_PREFIX = "triptych-tasks-"


def choose_result_store() -> None:
    """Name a database in a private folder, unless the operator named one.

    BentoML's default is one database in its home, which each server deletes when it starts: of two
    servers with one home, the older would lose its jobs. The workers of a server inherit the
    variable, so they use the same database.
    """
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    os.environ.setdefault(RESULT_STORE, str(Path(tempfile.gettempdir(), name, "results.db")))


def make_result_folder() -> None:
    """Make the database's folder if this process chose it; it is removed when the process exits."""
    folder = Path(os.environ[RESULT_STORE]).parent
    if folder.name.startswith(f"{_PREFIX}{os.getpid()}-"):
        folder.mkdir(mode=0o700)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


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
