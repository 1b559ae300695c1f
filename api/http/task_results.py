"""Where BentoML keeps the results of tasks: a private folder of this server's.

BentoML itself has one file in its home for all servers, which each of them deletes as it starts:
of two with one home the older would lose its tasks, and the younger might not start.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

FILE = "BENTOML_RESULT_STORE"
_PREFIX = "triptych-tasks-"


def choose_file() -> None:
    """Name the file, unless the operator did; to be called as the service is imported.

    The server's workers inherit the choice of the process that starts them.
    """
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    os.environ.setdefault(FILE, str(Path(tempfile.gettempdir(), name, "results.db")))


def make_folder() -> None:
    """Make the file's folder, if it is ours, before the server starts; it goes with the server."""
    folder = Path(os.environ[FILE]).parent
    if folder.name.startswith(f"{_PREFIX}{os.getpid()}-"):
        folder.mkdir(mode=0o700)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
