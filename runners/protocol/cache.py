"""The user's private cache folder: for compiled kernels and extensions, which are executed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path


class CacheUnavailable(Exception):
    """No folder that only this user can write to."""


def cache_folder(*parts: str) -> Path:
    """A folder below the cache that other users cannot write to. Raises: CacheUnavailable."""
    try:
        root = user_cache_path("triptych")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_shared(root)
        folder = root.joinpath(*parts)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise CacheUnavailable(str(error)) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CacheUnavailable(f"{folder} is not writable")
    return folder


def refuse_shared(folder: Path) -> None:
    """Raises: CacheUnavailable if other users can write to a folder."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheUnavailable(f"other users can write to {folder}")


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Hold the lock under which torch extensions are built in a folder.

    torch's own lock is a file that a killed build leaves behind and every later start waits for. It
    is stale while we hold our lock, which the kernel releases with its process.
    """
    with FileLock(folder / "triptych.lock"):
        for stale in folder.glob("**/lock"):
            stale.unlink(missing_ok=True)
        yield
