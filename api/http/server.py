"""uvicorn's server as Triptych runs it in BentoML's worker: bounded connections, and a clean end.

From SIGTERM on, new connections are refused, and requests in flight may finish. Those that exceed
`--timeout-graceful-shutdown` end with an error that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable

import uvicorn
from starlette.applications import Starlette
from typing_extensions import override

from api.http.context import abort_requests
from api.http.metrics import label_by_route
from api.http.protocol import DRAIN_IDLE_S, BoundedProtocol
from runners.contracts.errors import RunnerUnavailable

ABORT_GRACE_S = 5
"""Seconds to deliver the errors of the requests that are aborted."""


class HttpServer(uvicorn.Server):
    """A server of one BentoML app."""

    is_draining = False
    """Whether the server of this process shuts down."""

    def __init__(self, config: uvicorn.Config) -> None:
        # BentoML has no option for it.
        config.http = BoundedProtocol
        if isinstance(config.app, Starlette):
            label_by_route(config.app)
        super().__init__(config)

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or []:
            listener.set_inheritable(False)  # the ranks' processes have no use for it
        await super().startup(sockets)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        HttpServer.is_draining = True
        grace = self.config.timeout_graceful_shutdown
        if grace is not None:
            loop = asyncio.get_running_loop()
            reason = RunnerUnavailable("the server is shutting down; the request was aborted")
            loop.call_later(grace, abort_requests, reason)
            loop.call_later(grace + ABORT_GRACE_S, self._abort_connections)
            self.config.timeout_graceful_shutdown = grace + 2 * ABORT_GRACE_S
        await self._refuse_connections(sockets or [])
        await super().shutdown(sockets)

    async def _refuse_connections(self, listeners: Iterable[socket.socket]) -> None:
        """Accept the connections that the kernel has queued, and have it refuse others.

        `bentoml serve` holds the sockets too: if this process only closed them, the kernel would go
        on to queue connections, which would get no answer.
        """
        accepted = []
        for listener in listeners:
            listener.setblocking(False)
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])
                    accepted[-1].setblocking(False)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        opened = [
            asyncio.ensure_future(
                loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)
            )
            for connection in accepted
        ]
        if opened:
            # With TLS, a client that does not shake hands would keep the server from ending.
            _, pending = await asyncio.wait(opened, timeout=DRAIN_IDLE_S)
            for task in pending:
                task.cancel()
            await asyncio.gather(*opened, return_exceptions=True)

    def _protocol(self) -> BoundedProtocol:
        return BoundedProtocol(self.config, self.server_state, self.lifespan.state)

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()


def refuse_if_draining() -> None:
    """Raises: RunnerUnavailable once the server of this process shuts down."""
    if HttpServer.is_draining:
        raise RunnerUnavailable("the server is shutting down")


def install() -> None:
    """Make BentoML's worker, which creates a `uvicorn.Server`, create this one."""
    setattr(uvicorn, "Server", HttpServer)  # noqa: B010 - mypy forbids to assign a type
