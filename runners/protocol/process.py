"""How the processes of a rank group start and end together with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PRIVATE_VARIABLES = frozenset({"TRIPTYCH_API_KEY"})
"""Environment variables that child processes do not get."""

_PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """The environment of a child process that imports this project, without secrets."""
    search_path = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]
    env = {k: v for k, v in os.environ.items() if k not in PRIVATE_VARIABLES}
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, search_path))}


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM: the host decides when this process ends.

    Ctrl-C reaches every process of a terminal, and BentoML's supervisor sends SIGTERM to all its
    descendants, but running requests are finished first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends (Linux).

    `parent_pid` closes the race with a parent that died before this call. On other systems the end
    of the channel or of stdin ends the process a little later.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def give_back_memory() -> None:
    """Return the freed memory of this process to the system, which glibc keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def wait_for_eof(fd: int = 0) -> None:
    """Block until the other end of a pipe is closed.

    Reads the descriptor, not `sys.stdin`: a thread that waits in the lock of `sys.stdin` would
    block the exit of the interpreter.
    """
    while os.read(fd, 4096):
        pass
