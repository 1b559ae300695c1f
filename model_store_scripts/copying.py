"""Copying a model's files, hashing them on the way."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_store_scripts.progress import progress_bar
from runners.contracts.errors import ConfigError, IncompleteModel

CHUNK = 4 * 1024 * 1024


def total_bytes(files: Mapping[str, Path]) -> int:
    """The sum of the files' sizes."""
    return sum(path.stat().st_size for path in files.values())


def copy_files(
    files: Mapping[str, Path],
    target: Path | None,
    *,
    checksums: Mapping[str, str] | None = None,
) -> str:
    """Copy files (name to where it lies) into `target`, or only read them if that is None.

    A name's checksum, where there is one, must come out. Shows a progress bar on a terminal.
    Returns the fingerprint: one hash over all names and contents.

    Raises: ConfigError (no room, unreadable), IncompleteModel (a checksum that does not fit).
    """
    size = total_bytes(files)
    if target:
        target.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(target, size)
    fingerprint = hashlib.sha256()
    what = "copying" if target else "comparing"
    with progress_bar(size, "B", what) as bar:
        for name, path in sorted(files.items()):
            try:
                digest = _copy(path, target / name if target else None, bar)
            except OSError as error:
                raise ConfigError(f"{name} can not be copied: {error.strerror}") from None
            promised = (checksums or {}).get(name, digest)
            if digest != promised:
                raise IncompleteModel(
                    f"{name} is not what its source promises: delete {path.resolve()}, import again"
                )
            fingerprint.update(f"{name}\0{digest}\n".encode())
    return f"sha256:{fingerprint.hexdigest()}"


def _copy(path: Path, target: Path | None, bar: Any) -> str:
    digest = hashlib.sha256()
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source, (target or Path("/dev/null")).open("wb") as out:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _refuse_full_disk(target: Path, size: int) -> None:
    free = shutil.disk_usage(target).free
    if size > free:
        raise ConfigError(f"the model takes {size:,} bytes, {target} has room for {free:,}")
