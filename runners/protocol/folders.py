"""A private folder for each process, in the temporary folder, where its files are.

It is removed when the process exits, and if the process is killed, by the next process of the same
user that makes one. The process holds a lock on it while it lives: a process id alone says nothing
about a process in another container with the same temporary folder.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from runners.contracts.errors import ConfigError

_PREFIX = "triptych-"
_ROOM_BYTES = 1024 * 1024
"""What a start writes at most: the database of jobs, and the specs of the rank groups."""

_folders: list[Path] = []
"""This process's folder, once it is made."""


def process_folder() -> Path:
    """This process's folder; removes those of killed processes before it makes one.

    Raises: OSError.
    """
    if _folders and _folders[0].is_dir():
        return _folders[0]
    parent = _folders.pop().parent if _folders else Path(tempfile.gettempdir())
    _remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    _lock(folder)  # released by the end of this process
    _folders.append(folder)
    atexit.register(_remove_if_own, folder, os.getpid())
    return folder


def remove_process_folder() -> None:
    """Remove it now; for a process that does not end by an ordinary exit, but by a signal."""
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def check_room() -> None:
    """Raises: ConfigError if the temporary folder has no room for what a start writes there."""
    try:
        with tempfile.TemporaryFile(dir=process_folder()) as file:
            os.posix_fallocate(file.fileno(), 0, _ROOM_BYTES)
    except OSError as error:
        raise ConfigError(
            f"the temporary folder cannot be written to: {error.strerror or error}; make room in "
            f"{os.environ.get('TMPDIR', '/tmp')}, or set TMPDIR to another folder"  # noqa: S108
        ) from None


def _remove_stale(parent: Path) -> None:
    for old in parent.glob(f"{_PREFIX}*-*"):
        owner = old.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError, psutil.Error):  # it was removed meanwhile
            may_remove = old.lstat().st_uid == os.getuid() and owner.isascii() and owner.isdecimal()
            if may_remove and not _lives(int(owner)) and (lock := _lock(old)) is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A new file descriptor that holds a folder's lock; None if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a process that was forked from this one
        shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that was killed may stay as a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
