"""The service as a Ray Serve application, deployed from the config that `deploy.render ray` prints.

Ray imports this module in each replica, an actor that runs the whole service and starts its rank
processes. Ray routes requests among the replicas that are ready, restarts one that fails its health
check, and moves it when its machine is lost. `TRIPTYCH_*` variables choose models and limits.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from filelock import FileLock
from ray import serve

from deploy.ray_serve import TASK_RESULTS
from runners.protocol.folders import remove_process_folder

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLL_S = 0.2


def service_app() -> ASGIApp:
    """The service; its start-up ends only when its models are ready.

    Raises: RuntimeError, one sentence for the operator, if there is nothing to serve.
    """
    try:
        # Imported in the replica only: the import reads the replica's settings.
        import service
        from api.http.metrics import label_by_route

        triptych: Any = service.Triptych  # the decorator is untyped
        triptych.inner.check_model()
    except SystemExit as stop:
        remove_process_folder()
        raise RuntimeError(str(stop)) from None
    results = Path(os.environ[TASK_RESULTS])
    _make_table(results)
    inner: Any = triptych.to_asgi()
    label_by_route(inner)

    async def until_ready(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_when_ready(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                failure = await _failure(inner)
                if failure is not None:
                    message = {"type": "lifespan.startup.failed", "message": failure}
            if message["type"] != "lifespan.startup.complete":
                # Here, since Ray does not wait for the process to exit.
                remove_process_folder()
            await send(message)

        await inner(scope, receive, send_when_ready if scope["type"] == "lifespan" else send)

    return until_ready


@serve.ingress(service_app)
class Replica:
    """One copy of the service."""

    app: ASGIApp
    """The return value of `service_app`; Ray sets it."""

    async def check_health(self) -> None:
        """Raises: RuntimeError once a runner has failed for good; Ray then replaces the replica."""
        if (failure := await _problem(self.app, "/livez")) is not None:
            raise RuntimeError(failure)


def _make_table(results: Path) -> None:
    """Create the table of job results, as `bentoml serve` does before its workers start.

    Raises: RuntimeError if another user owns its folder.
    """
    from _bentoml_impl.tasks import Sqlite3Store  # type: ignore[import-untyped]

    results.parent.mkdir(mode=0o700, exist_ok=True)
    if results.parent.lstat().st_uid != os.getuid():
        raise RuntimeError(f"{TASK_RESULTS}: {results.parent} belongs to another user")
    # Replicas that share the file create it one after another: SQLite refuses the second.
    with FileLock(results.with_name("lock")):
        Sqlite3Store.init_db(str(results))


async def _failure(app: ASGIApp) -> str | None:
    """Wait until the models are ready. Returns None, or why they never will be."""
    while await _problem(app, "/readyz") is not None:
        if (failure := await _problem(app, "/livez")) is not None:
            return failure
        await asyncio.sleep(POLL_S)
    return None


async def _problem(app: ASGIApp, probe: str) -> str | None:
    """The message of a probe that fails; None if it passes."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        answer = await client.get(probe)
    return None if answer.status_code == 200 else str(answer.json()["error"]["message"])


# The service itself refuses requests with 429, so Ray's limit is far above its own. The number of
# replicas and their GPUs are in the Serve config, which `deploy.render` computes from the models.
app = serve.deployment(name="Triptych", max_ongoing_requests=10_000)(Replica).bind()
