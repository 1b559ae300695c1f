"""Ties a process to its parent's life, also where the parent had no chance to clean up."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def outlive_signals() -> None:
    """Leave it to the host when this process ends.

    Ctrl-C reaches a whole terminal, and BentoML's supervisor sends SIGTERM to all its descendants;
    but requests in flight are to be finished first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends (Linux).

    `parent_pid` closes the race with a parent that died before this call. Elsewhere than on Linux
    the end of the channel or of stdin does the same a little later.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


PROJECT_ROOT = Path(__file__).resolve().parents[2]


PRIVATE_VARIABLES = frozenset({"TRIPTYCH_API_KEY"})
