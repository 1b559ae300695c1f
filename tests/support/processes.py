"""Watching processes: what a rank group started, and that nothing of it is left."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

FORKED_RANKS: set[int] = set()
"""The process ids of the ranks that `tests.support.forked_ranks` started."""


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """All living processes below `pid` (this process by default), zombies aside."""
    return alive(psutil.Process(pid).children(recursive=True))


def ranks_below(pid: int) -> list[psutil.Process]:
    """The rank worker processes of a server."""
    return [p for p in descendants(pid) if _is_rank(p)]


def own_ranks() -> list[psutil.Process]:
    """The rank worker processes of this process's own rank groups, not of servers it started."""
    parents = psutil.Process().children()  # launchers, and the server that forks ranks
    children = [child for parent in parents for child in _children(parent)]
    return [p for p in alive(children) if _is_rank(p) or p.pid in FORKED_RANKS]


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.NoSuchProcess:  # it ended meanwhile
        return []


def _is_rank(process: psutil.Process) -> bool:
    return "runners.rank.worker" in _cmdline(process)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run."""
    return [p for p in processes if _lives(p)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended meanwhile
        return False


def stop(process: psutil.Process) -> None:
    """SIGSTOP, and wait until every thread has stopped: on a busy machine some run on for a while.

    Raises: AssertionError.
    """
    process.send_signal(signal.SIGSTOP)
    threads = Path("/proc", str(process.pid), "task")

    def has_stopped() -> bool:
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in threads.glob("*/stat")]
        return set(states) == {"T"}

    wait_until(has_stopped, 10, "all threads of the process have stopped")


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until true. Raises: AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.05)


def mii_processes(folder: Path) -> list[psutil.Process]:
    """The processes of deployments whose plan is below `folder`."""
    matches = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        is_of_deployment = any(argument.startswith("runners.engines.mii.") for argument in command)
        if is_of_deployment and any(str(folder) in argument for argument in command):
            matches.append(process)
    return matches
