"""A real server in its own processes: `bentoml serve` on a free loopback port."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from tests.support.processes import alive, descendants, wait_until

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 90.0
HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
"""For single requests, each on a connection of its own. A new client takes 26 ms of CPU time."""
STOP_TIMEOUT = 30.0


def bentoml_command(*arguments: str) -> list[str]:
    """The command line of a `bentoml` of this environment."""
    return [str(Path(sys.executable).with_name("bentoml")), *arguments]


def environment(home: Path, **changes: str) -> dict[str, str]:
    """This process's environment with a model store of its own and no choices of the developer."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRIPTYCH_", "BENTOML_"))}
    return env | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"} | changes


class Server:
    """`bentoml serve TARGET`. As a context manager it is ready inside and all gone outside."""

    def __init__(
        self, home: Path, variables: Mapping[str, str], *, target: str = ".", cwd: Path = ROOT
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = home / f"server-{self.port}.log"
        self._env = environment(home, TRIPTYCH_NUM_THREADS="1", PORT=str(self.port))
        self._env |= dict(variables)
        self.command = bentoml_command("serve", target, "--host", "127.0.0.1")
        self._cwd = cwd
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Start it; returns at once."""
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self._cwd,
                env=self._env,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # one of its own, as a shell gives a command
            )
        return self

    @property
    def log(self) -> str:
        """What all its processes wrote so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        """The process id of `bentoml serve`."""
        assert self.process is not None
        return self.process.pid

    def get(self, path: str) -> httpx.Response:
        """A single GET."""
        return HTTP.get(self.url + path, timeout=30)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        """A single POST of JSON."""
        return HTTP.post(self.url + path, json=body, headers=headers, timeout=60)

    def gauge(self, name: str) -> float:
        """A metric without labels but the model's."""
        found = re.search(rf"^triptych_{name}{{model=[^}}]*}} (\S+)$", self.metrics(), re.M)
        assert found is not None, name
        return float(found[1])

    def metrics(self) -> str:
        """The text of `/metrics`."""
        return self.get("/metrics").text

    def readiness(self) -> tuple[int, str]:
        """Status of `/readyz` and the message of its error; 0 while nobody listens."""
        try:
            answer = self.get("/readyz")
        except httpx.TransportError:
            return 0, ""
        message = "" if answer.is_success else answer.json()["error"]["message"]
        return answer.status_code, message

    def wait_ready(self, timeout: float = START_TIMEOUT) -> Server:
        """Wait until `/readyz` is 200. Raises: AssertionError with the log."""
        deadline = time.monotonic() + timeout
        while self.readiness()[0] != 200:
            assert self.process is not None
            assert self.process.poll() is None, f"the server ended:\n{self.log[-4000:]}"
            assert time.monotonic() < deadline, f"not ready:\n{self.log[-4000:]}"
            time.sleep(0.1)
        return self

    def stop(self, *, interrupt: bool = False) -> None:
        """End it by SIGTERM, or as Ctrl-C does; nothing of it may be left."""
        assert self.process is not None
        if self.process.poll() is not None:
            return
        family = [psutil.Process(self.pid), *descendants(self.pid)]
        if interrupt:
            os.killpg(self.pid, signal.SIGINT)
        else:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT)
            wait_until(lambda: not alive(family), 5, "all processes of the server are gone")
        finally:
            for process in alive(family):
                process.kill()

    def __enter__(self) -> Server:
        self.start()
        try:
            return self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if kind is None:
            self.assert_clean_log()

    def assert_clean_log(self) -> None:
        """No traceback, and no task whose error or end nobody saw."""
        for trouble in ("Traceback", "never retrieved", "was destroyed", "never awaited"):
            assert trouble not in self.log, self.log[-4000:]


def metric(text: str, name: str, **labels: str) -> float:
    """A sample's value, 0 if it is not there yet."""
    wanted = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
    found = re.search(rf"^triptych_{re.escape(name)}{{{re.escape(wanted)}}} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0
