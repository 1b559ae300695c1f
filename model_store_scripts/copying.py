"""Copying a model's files and hashing them in one pass."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_store_scripts.progress import progress_bar
from runners.contracts.errors import ConfigError, IncompleteModel

CHUNK_BYTES = 4 * 1024 * 1024


def total_bytes(files: Mapping[str, Path]) -> int:
    """The sum of the files' sizes."""
    return sum(path.stat().st_size for path in files.values())


def copy_files(
    files: Mapping[str, Path],
    target: Path | None,
    *,
    checksums: Mapping[str, str],
) -> str:
    """Copy files (name to path) into `target`, or only read them if that is None.

    A file for which `checksums` has a sha256 must match it. Shows a progress bar on a terminal.
    Returns the fingerprint: one hash over all names and contents.

    Raises: ConfigError (no room, unreadable), IncompleteModel (a checksum that does not match).
    """
    size = total_bytes(files)
    if target:
        target.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(target, size)
    fingerprint = hashlib.sha256()
    with progress_bar(size, "B", "copying" if target else "comparing") as bar:
        for name, path in sorted(files.items()):
            try:
                digest = _copy(path, target / name if target else None, bar)
            except OSError as error:
                raise ConfigError(f"{name} cannot be copied: {error.strerror}") from None
            if digest != checksums.get(name, digest):
                raise IncompleteModel(
                    f"{name} does not match its checksum: delete {path.resolve()}, import again"
                )
            fingerprint.update(f"{name}\0{digest}\n".encode())
    return f"sha256:{fingerprint.hexdigest()}"


def _copy(path: Path, target: Path | None, bar: Any) -> str:
    """The sha256 of a file that is copied, or only read."""
    digest = hashlib.sha256()
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source, (target or Path("/dev/null")).open("wb") as out:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _refuse_full_disk(target: Path, size: int) -> None:
    free = shutil.disk_usage(target).free
    if size > free:
        raise ConfigError(
            f"the model needs {size:,} bytes, but the disk of the model store has only {free:,}"
        )
