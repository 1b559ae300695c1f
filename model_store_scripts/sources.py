"""Where a model comes from: a folder here, or a hub repository (`hub.py`), behind one face."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel

MAX_FILES = 10_000


class Source(Protocol):
    """A model's files, by their names relative to `root`, with `/` between folders."""

    @property
    def root(self) -> Path:
        """The folder of the files; those of a hub are there once fetched."""

    @property
    def names(self) -> frozenset[str]:
        """Every file the source has, fetched or not."""

    @property
    def revision(self) -> str | None:
        """The commit the files belong to, where there is one."""

    @property
    def checksums(self) -> Mapping[str, str]:
        """The sha256 that the source promises, for the files it promises one for."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """What lies beside the model and is no part of it."""

    def fetch(self, names: Iterable[str]) -> None:
        """Make these files present under `root`. Raises: ConfigError."""


class FolderSource:
    """A model on this machine: `root`, which is `folder`, or lies in it as TorchServe has it.

    `set_aside`: names in `folder` that are no part of a model, whatever lies there.

    Raises: IncompleteModel (a link that leads nowhere), UnsafeModel (a way or a link that leads out
    of `folder`, a device or pipe), ConfigError (unreadable, or far too many files).
    """

    revision: str | None = None
    checksums: Mapping[str, str] = {}

    def __init__(self, folder: Path, root: Path, set_aside: Collection[str] = ()) -> None:
        self.root = root
        way = root.relative_to(folder).parts if root.is_relative_to(folder) else ("..",)
        if ".." in way:
            raise UnsafeModel(
                f"model_path leads out of {folder}: import {root} itself, with --setup-config (an "
                "archive: with --model-path)"
            )
        if way:
            refuse_leaving(root, folder)
        self.names = frozenset(_walk(root, () if way else set_aside))
        beside = [n for n in sorted(os.listdir(folder)) if way and n != way[0]]
        self.ignored = tuple(n for n in beside if n not in set_aside)

    def fetch(self, names: Iterable[str]) -> None:
        """A folder has all its files already."""


def refuse_leaving(path: Path, folder: Path) -> None:
    """What a model folder names lies in it. Raises: UnsafeModel, IncompleteModel."""
    allowed = [place for place in (folder.resolve(), _hub_blobs(folder)) if place]
    _refuse_leaving_link(path, path.name, *allowed)
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise UnsafeModel(f"{path} does not lie in the model folder {folder}")


def _walk(root: Path, set_aside: Collection[str]) -> Iterator[str]:
    """Every file below `root`, hidden ones (git's, the hub client's, a Mac's) aside."""
    allowed = (root.resolve(), _hub_blobs(root))
    count = 0
    for folder, subfolders, files in os.walk(root, onerror=_unreadable):
        top = folder == str(root)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        files = [f for f in files if not f.startswith(".")]
        if top:
            subfolders[:] = [s for s in subfolders if s not in set_aside]
            files = [f for f in files if f not in set_aside]
        for name in [*subfolders, *files]:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            _refuse_leaving_link(path, relative, *allowed)
            if name in subfolders:
                if path.is_symlink():
                    raise UnsafeModel(f"{relative} is a link to a folder, which is not followed")
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                raise UnsafeModel(f"{relative} is not a regular file")
            count += 1
            if count > MAX_FILES:
                raise ConfigError(f"{root} holds more than {MAX_FILES} files: no model folder")
            yield relative


def _refuse_leaving_link(path: Path, name: str, *allowed: Path | None) -> None:
    if not path.is_symlink():
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise IncompleteModel(f"{name} is a link that leads nowhere") from None
    if not any(target.is_relative_to(folder) for folder in allowed if folder):
        raise UnsafeModel(f"{name} is a link that leads out of the model folder")


def _hub_blobs(root: Path) -> Path | None:
    """The hub cache keeps a snapshot as links into the `blobs` folder of the same repository."""
    repository = root.resolve().parent.parent
    return repository / "blobs" if root.resolve().parent.name == "snapshots" else None


def _unreadable(error: OSError) -> None:
    raise ConfigError(f"{error.filename} can not be read: {error.strerror}")
