"""A server's processes: starting, watching and ending all of them."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

TERM_S = 20.0
SAMPLE_S = 1.0


class ProcessTree:
    """A process and everything below it."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._cpu: dict[int, float] = {}

    def members(self) -> list[psutil.Process]:
        """The living ones."""
        with contextlib.suppress(psutil.Error):
            return [self._root, *self._root.children(recursive=True)]
        return []

    def cpu_seconds(self) -> float:
        """User and system time of all, those included that ended since an earlier call."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system
        return sum(self._cpu.values())

    def memory(self) -> int:
        """Proportional set size of all, in bytes: pages shared by n processes count 1/n each."""
        return sum(proportional_memory(process.pid) for process in self.members())

    def stop(self) -> None:
        """End all: politely the first, and by force what is left of the rest."""
        members = self.members()
        if not members:
            return
        with contextlib.suppress(psutil.Error):
            self._root.terminate()
        _, left = psutil.wait_procs(members, timeout=TERM_S)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=TERM_S)


@dataclass(frozen=True)
class CpuClock:
    """CPU seconds since each part of the machine began: read twice, the difference is the use."""

    server: float
    others: float

    @staticmethod
    def read(tree: ProcessTree) -> CpuClock:
        """Now. `others` is what neither the server nor this process took."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        server = tree.cpu_seconds()
        return CpuClock(server, busy - server - time.process_time())

    def __sub__(self, earlier: CpuClock) -> CpuClock:
        return CpuClock(self.server - earlier.server, self.others - earlier.others)


def proportional_memory(pid: int) -> int:
    """PSS of one process in bytes; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def spawn(
    command: list[str], *, cwd: Path, env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a server in a process group of its own, so that Ctrl-C here stays here."""
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
    """Samples `tree.memory()` while the block runs; the list's only item is the highest."""
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
