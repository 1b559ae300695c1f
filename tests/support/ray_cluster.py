"""A Ray cluster on this machine, with applications deployed by `serve deploy`."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import httpx

from runners.engines.mii.deployment.ports import free_port
from tests.support.processes import alive, descendants, wait_until
from tests.support.server import HTTP, ROOT, environment

LOOPBACK = "127.0.0.1"
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


class RayCluster:
    """`ray start --head`. As a context manager it leaves no process and no file behind."""

    def __init__(self, home: Path, variables: Mapping[str, str]) -> None:
        # A short path: Ray's sockets are in it, and their paths are limited to 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.temporary = self._folder / "tmp"
        """The folder for temporary files of its processes."""
        self.temporary.mkdir()
        self._log = home / "ray.log"
        folders = {"HOME": str(home), "TMPDIR": str(self.temporary)}
        self._env = environment(home, RAY_USAGE_STATS_ENABLED="0", **folders) | dict(variables)
        ports = {name: free_port() for name in PORTS}
        self._dashboard = f"http://{LOOPBACK}:{ports['dashboard-port']}"
        self._applications_url = f"{self._dashboard}/api/serve/applications/"
        self._command = [
            *(_program("ray"), "start", "--head", "--block", f"--node-ip-address={LOOPBACK}"),
            *(f"--{name}={port}" for name, port in ports.items()),
            *("--num-cpus=8", "--num-gpus=0", "--object-store-memory=100000000"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self._folder / 'ray'}"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of `ray start`, the ancestor of all others."""
        assert self._process is not None
        return self._process.pid

    def deploy(self, config: Path, timeout: float = 180) -> None:
        """`serve deploy`, and wait until all applications run.

        Raises: AssertionError with Ray's status of them.
        """
        self._serve("deploy", str(config))
        wait_until(lambda: self._applications() == {"RUNNING"}, timeout, "the application runs")

    def shut_down(self) -> None:
        """`serve shutdown`, and wait until the replicas are gone."""
        self._serve("shutdown", "--yes")
        wait_until(lambda: not self._applications(), 60, "the application is gone")

    def status(self) -> str:
        """The output of `serve status`."""
        return self._serve("status")

    def answered(self, request_id: str) -> list[int]:
        """How many requests of an X-Request-ID each replica answered with 200, by Ray's logs."""
        logs = (self._folder / "ray/session_latest/logs/serve").glob("replica_*.log")
        return [log.read_text().count(f" {request_id} -- POST / 200 ") for log in logs]

    def _applications(self) -> set[str]:
        # What `serve status` asks; the command itself takes seconds of CPU time to start.
        applications = HTTP.get(self._applications_url).json()["applications"]
        states = {each["status"] for each in applications.values()}
        assert not states & {"DEPLOY_FAILED", "UNHEALTHY"}, applications
        return states

    def _serve(self, *arguments: str) -> str:
        command = [_program("serve"), *arguments, "--address", self._dashboard]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        try:
            return HTTP.get(self._applications_url).status_code == 200
        except httpx.TransportError:
            return False

    def __enter__(self) -> RayCluster:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._env, stdout=log, stderr=log, process_group=0
            )
        try:
            wait_until(self._listens, 60, "Ray runs")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        cls: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        assert self._process is not None
        family = descendants(self.pid)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
            wait_until(lambda: not alive(family), 30, "all of Ray is gone")
        finally:
            for process in alive(family):
                process.kill()
            self._process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
