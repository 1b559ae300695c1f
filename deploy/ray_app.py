"""The same service under Ray Serve: `serve deploy` of what `deploy.render ray` renders.

A replica is an actor that holds the whole service, rank processes included; Ray routes requests
among those that are ready, starts one that fails its health check again, and moves it when its
machine is lost. Models and limits are chosen as everywhere, by the `TRIPTYCH_*` variables.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from ray import serve

from deploy.ray_serve import TASK_RESULTS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLL_S = 0.2


def service_app() -> ASGIApp:
    """The service, whose start is over only once its models are ready.

    Raises: RuntimeError with the sentence for the operator if there is nothing to serve.
    """
    # Without it /metrics fails. BentoML sets it in its workers; the service replaces it.
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.gettempdir())
    shared = TASK_RESULTS in os.environ
    # In the replica only: prometheus_client and the service read variables when imported.
    from api.http.metrics import remove_private_folder

    try:
        import service

        triptych: Any = service.Triptych  # what its decorator, which has no types, made of it
        triptych.inner.check_model()
    except SystemExit as stop:
        remove_private_folder()
        raise RuntimeError(str(stop)) from None
    results = Path(os.environ[TASK_RESULTS])
    _make_table(results)
    inner: ASGIApp = triptych.to_asgi()

    async def until_ready(scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                failure = await _failure(inner)
                if failure is not None:
                    message = {"type": "lifespan.startup.failed", "message": failure}
            if message["type"] != "lifespan.startup.complete":
                # Not at the process' end, which Ray does not wait for.
                remove_private_folder()
                if not shared:
                    shutil.rmtree(results.parent, ignore_errors=True)
            await send(message)

        await inner(scope, receive, told if scope["type"] == "lifespan" else send)

    return until_ready


@serve.ingress(service_app)
class Replica:
    """One copy of the service."""

    app: ASGIApp
    """What `service_app` returned; Ray sets it."""

    async def check_health(self) -> None:
        """Raises: RuntimeError once a runner has given up for good, upon which Ray replaces us."""
        if (failure := await _says(self.app, "/livez")) is not None:
            raise RuntimeError(failure)


def _make_table(results: Path) -> None:
    """The table of tasks' results, as `bentoml serve` makes it before its workers start.

    Raises: RuntimeError if somebody else could read it.
    """
    from _bentoml_impl.tasks import Sqlite3Store  # type: ignore[import-untyped]

    results.parent.mkdir(mode=0o700, exist_ok=True)
    if results.parent.lstat().st_uid != os.getuid():
        raise RuntimeError(f"{TASK_RESULTS}: {results.parent} belongs to another user")
    folder = os.open(results.parent, os.O_RDONLY)
    try:
        # Replicas that share the file come one by one: SQLite turns a second one away.
        fcntl.flock(folder, fcntl.LOCK_EX)
        Sqlite3Store.init_db(str(results))
    finally:
        os.close(folder)


async def _failure(app: ASGIApp) -> str | None:
    """Wait for the models; why they will never be ready, or None once they are."""
    while await _says(app, "/readyz") is not None:
        if (failure := await _says(app, "/livez")) is not None:
            return failure
        await asyncio.sleep(POLL_S)
    return None


async def _says(app: ASGIApp, probe: str) -> str | None:
    """What a probe of the service has to say; None if all is well."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        answer = await client.get(probe)
    return None if answer.status_code == 200 else answer.text


# Admission, with its 429, is the service's own. How many replicas, and of how many GPUs each, is
# for a Serve config to say, which `deploy.render` computes from the models.
app = serve.deployment(name="Triptych", max_ongoing_requests=10_000)(Replica).bind()
