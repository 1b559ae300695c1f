"""What the benchmarks need to know of a server, and how one is run."""

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
from benchmarks.client import Dialect, ask, client_session
from benchmarks.processes import ProcessTree, spawn
from benchmarks.workload import Request

START_TIMEOUT_S = 240.0
CONTEXT_PER_REQUEST = 512
"""Tokens that a server with a fixed room per request reserves; the longest request has 384."""


@dataclass(frozen=True)
class Launch:
    """How a server is started."""

    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """On top of this process's environment, in which no server's own variables are left."""
    cwd: Path = ROOT


class Server(Protocol):
    """A server that is measured."""

    @property
    def name(self) -> str:
        """What tables and the command line call it."""
        ...

    @property
    def ready_path(self) -> str:
        """Answers 200 once it serves."""
        ...

    def dialect(self) -> Dialect:
        """How it is asked; called after `prepare`."""
        ...

    def prepare(self) -> str:
        """Install and convert what it needs, once; returns its version. Raises: Unavailable."""
        ...

    def launch(self, port: int, *, threads: int, concurrency: int) -> Launch:
        """How to start it for up to `concurrency` requests at once on `threads` CPU threads."""
        ...


@dataclass(frozen=True)
class Running:
    """A server that is up."""

    url: str
    pid: int
    tree: ProcessTree
    dialect: Dialect
    startup_s: float
    """Seconds from its start to the end of its first answer."""
    log: Path


@contextlib.asynccontextmanager
async def running(
    server: Server, probe: Request, *, threads: int, concurrency: int
) -> AsyncIterator[Running]:
    """The server, up and with `probe` answered; afterwards nothing of it is left.

    Raises: Unavailable if it does not come up or does not answer.
    """
    port = free_port()
    launch = server.launch(port, threads=threads, concurrency=concurrency)
    log = cache() / "logs" / f"{server.name}.log"
    began = time.monotonic()
    process = spawn(launch.command, cwd=launch.cwd, env=environment(launch.env), log=log)
    tree = ProcessTree(process.pid)
    url = f"http://127.0.0.1:{port}"
    try:
        async with client_session() as session:
            await _wait(session, url + server.ready_path, process.poll, log)
            answer = await ask(session, url, server.dialect(), probe)
        if answer.problem is not None:
            raise Unavailable(f"the first request failed: {answer.problem}")
        took = time.monotonic() - began
        yield Running(url, process.pid, tree, server.dialect(), took, log)
    finally:
        await asyncio.to_thread(tree.stop)
        process.wait()


async def _wait(
    session: aiohttp.ClientSession, url: str, ended: Callable[[], int | None], log: Path
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(url) as answer:
                if answer.status == 200:
                    return
        if ended() is not None:
            raise Unavailable(f"the server ended: {_tail(log)}")
        if time.monotonic() > deadline:
            raise Unavailable(f"not ready within {START_TIMEOUT_S:.0f} s: {_tail(log)}")
        await asyncio.sleep(0.1)


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without anybody's settings of servers, and the changes."""
    private = ("TRIPTYCH_", "BENTOML_", "LLAMA_", "OMP_", "MKL_", "KMP_", "OV_", "TS_", "PYTHON")
    env = {k: v for k, v in os.environ.items() if not k.startswith(private)}
    return env | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | dict(changes)


def executable(name: str) -> str:
    """A script of this Python environment."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-3:])[-600:]
