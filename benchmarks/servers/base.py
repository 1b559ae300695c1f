"""The interface of a server to measure, and its start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import aiohttp

from benchmarks.cache import ROOT, Unavailable, cache
from benchmarks.client import Dialect, client_session, send_request
from benchmarks.processes import ProcessTree, spawn
from benchmarks.workload import Request

START_TIMEOUT_S = 240.0
CONTEXT_PER_REQUEST = 512
"""KV tokens reserved per request by servers that need a fixed size; the longest request has 384."""


@dataclass(frozen=True)
class Launch:
    """The command that starts a server, and its environment."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the result of `environment`."""
    cwd: Path = ROOT


class Server(Protocol):
    """A server to measure."""

    @property
    def name(self) -> str:
        """Its name in the tables and on the command line."""
        ...

    @property
    def ready_path(self) -> str:
        """The path that responds with 200 once the server is ready."""
        ...

    def dialect(self) -> Dialect:
        """Its API; called after `prepare`."""
        ...

    def prepare(self) -> str:
        """Install and convert what it needs, once. Returns its version; raises Unavailable."""
        ...

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """How to start it for up to `concurrency` concurrent requests on `threads` CPU threads."""
        ...


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready."""

    url: str
    pid: int
    tree: ProcessTree
    dialect: Dialect
    startup_s: float
    """Seconds from its start to the end of its first response."""
    log: Path


@contextlib.asynccontextmanager
async def run_server(
    server: Server, probe: Request, *, threads: int, concurrency: int
) -> AsyncIterator[RunningServer]:
    """Start a server and send it `probe`; on exit, stop all its processes.

    Raises: Unavailable if it does not start or the probe fails.
    """
    port = free_port()
    launch = server.launch(port, threads=threads, concurrency=concurrency)
    log = cache() / "logs" / f"{server.name}.log"
    start = time.monotonic()
    process = spawn(launch.command, cwd=launch.cwd, env=environment(launch.env), log=log)
    tree = ProcessTree(process.pid)
    url = f"http://127.0.0.1:{port}"
    try:
        async with client_session() as session:
            await _wait(session, url + server.ready_path, process.poll, log)
            record = await send_request(session, url, server.dialect(), probe)
        if record.problem is not None:
            raise Unavailable(f"the first request failed: {record.problem}")
        startup_s = time.monotonic() - start
        yield RunningServer(url, process.pid, tree, server.dialect(), startup_s, log)
    finally:
        await asyncio.to_thread(tree.stop)
        process.wait()


async def _wait(
    session: aiohttp.ClientSession, url: str, poll: Callable[[], int | None], log: Path
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(url) as response:
                if response.status == 200:
                    return
        if poll() is not None:
            raise Unavailable(f"the server exited: {_tail(log)}")
        if time.monotonic() > deadline:
            raise Unavailable(f"not ready within {START_TIMEOUT_S:.0f} s: {_tail(log)}")
        await asyncio.sleep(0.1)


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without variables that configure a server, plus `changes`."""
    prefixes = ("TRIPTYCH_", "BENTOML_", "LLAMA_", "OMP_", "MKL_", "KMP_", "OV_", "TS_", "PYTHON")
    env = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    return env | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | dict(changes)


def executable(name: str) -> str:
    """The path of a script of this Python environment."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """An unused loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-3:])[-600:]
