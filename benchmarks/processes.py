"""The processes of a server: starting, measuring and stopping them."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

HTTP_WORKER, RANK = "_bentoml_impl.worker.service", "runners.rank.worker"
"""The modules of two kinds of Triptych's processes."""
TERM_S = 20.0
SAMPLE_S = 1.0


class ProcessTree:
    """A process and all its descendants."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._cpu: dict[int, float] = {}

    def members(self) -> list[psutil.Process]:
        """The processes that are alive."""
        with contextlib.suppress(psutil.Error):
            return [self._root, *self._root.children(recursive=True)]
        return []

    def running(self, module: str) -> list[psutil.Process]:
        """Those that run `python -m module`, the oldest first."""
        matches = []
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline():
                    matches.append((process.create_time(), process.pid, process))
        return [process for _, _, process in sorted(matches)]

    def cpu_seconds(self) -> float:
        """User and system time of all, including processes that ended after an earlier call."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system
        return sum(self._cpu.values())

    def memory(self) -> int:
        """Total proportional set size in bytes: n processes each count 1/n of a shared page."""
        return sum(proportional_memory(process.pid) for process in self.members())

    def stop(self) -> None:
        """Send SIGTERM to the root, and SIGKILL to what is alive after `TERM_S` seconds."""
        members = self.members()
        if not members:
            return
        with contextlib.suppress(psutil.Error):
            self._root.terminate()
        _, alive = psutil.wait_procs(members, timeout=TERM_S)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=TERM_S)


@dataclass(frozen=True)
class CpuClock:
    """Cumulative CPU seconds; the difference of two readings is the usage in between."""

    server: float
    others: float

    @staticmethod
    def read(tree: ProcessTree) -> CpuClock:
        """The current reading. `others` excludes the server and this process."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        server = tree.cpu_seconds()
        return CpuClock(server, busy - server - time.process_time())

    def __sub__(self, earlier: CpuClock) -> CpuClock:
        return CpuClock(self.server - earlier.server, self.others - earlier.others)


def proportional_memory(pid: int) -> int:
    """Proportional set size of a process in bytes; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def spawn(
    command: list[str], *, cwd: Path, env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a server in a new process group, so that Ctrl-C does not reach it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


@contextlib.asynccontextmanager
async def peak_memory(tree: ProcessTree) -> AsyncIterator[list[int]]:
    """Sample `tree.memory()` while the block runs. The list's only item is the maximum in bytes."""
    peak = [await asyncio.to_thread(tree.memory)]

    async def sample() -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            peak[0] = max(peak[0], await asyncio.to_thread(tree.memory))

    task = asyncio.create_task(sample())
    try:
        yield peak
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        peak[0] = max(peak[0], await asyncio.to_thread(tree.memory))
