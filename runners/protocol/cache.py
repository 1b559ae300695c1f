"""The private folder for what is compiled once and kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NoCache(Exception):
    """There is no folder to keep compiled kernels in."""


def cache_folder() -> Path:
    """A folder that nobody else can write to: what lies in it gets executed. Raises: NoCache."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "triptych"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise NoCache(str(error)) from None
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NoCache(f"{folder} can be written by others")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NoCache(f"{folder} can not be written to")
    return folder
