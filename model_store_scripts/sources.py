"""Where a model comes from: a folder of this machine, or a hub repository (`hub.py`)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

from typing_extensions import override

from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel

MAX_FILES = 10_000

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class NamedFolder:
    """A folder and what messages call it: an unpacked archive has the archive's name."""

    path: Path
    name: str

    def name_of(self, path: Path) -> str:
        """What messages call this folder or a path in it; another path is its own name."""
        if not path.is_relative_to(self.path):
            return str(path)
        return str(Path(self.name, path.relative_to(self.path)))


def is_hub_id(source: str) -> bool:
    """Whether a model on the hub can have this name."""
    return _HUB_ID.fullmatch(source) is not None


class Source(Protocol):
    """A model's files, by their names relative to `root`, with `/` between folders."""

    root: Path
    """The folder of the files; those of a hub repository are there once fetched."""
    names: frozenset[str]
    """All files of the source, fetched or not."""
    revision: str | None
    """The commit of the files, if there is one."""
    ignored: tuple[str, ...]
    """Files and folders next to the model's folder."""

    def checksums(self) -> Mapping[str, str]:
        """The sha256 of each file for which the source publishes one."""

    def fetch(self, names: Iterable[str]) -> None:
        """Make these files present below `root`. Raises: ConfigError."""


class FolderSource(Source):
    """A model on this machine: `root`, which is `folder` or, as in TorchServe's archives, below it.

    `excluded`: names in `folder` that are no part of a model.

    Raises: IncompleteModel (a dangling link), UnsafeModel (a path or a link that leads out of
    `folder`, a device or pipe), ConfigError (unreadable, or far too many files).
    """

    revision = None

    def __init__(self, folder: NamedFolder, root: Path, excluded: Collection[str] = ()) -> None:
        self.root = root
        parts = root.relative_to(folder.path).parts if root.is_relative_to(folder.path) else ("..",)
        if ".." in parts:
            raise UnsafeModel(
                f"model_path leads out of {folder.name}: import {folder.name_of(root)} itself, "
                "with --setup-config (an archive: with --model-path)"
            )
        if parts:
            refuse_leaving(root, folder)
        self.names = frozenset(_walk(root, folder, () if parts else excluded))
        siblings = [n for n in sorted(os.listdir(folder.path)) if parts and n != parts[0]]
        self.ignored = tuple(n for n in siblings if n not in excluded)

    @override
    def checksums(self) -> Mapping[str, str]:
        return {}

    @override
    def fetch(self, names: Iterable[str]) -> None:
        pass


def refuse_leaving(path: Path, folder: NamedFolder) -> None:
    """Refuse a path that a model folder names if it is not in it.

    Raises: UnsafeModel, IncompleteModel.
    """
    allowed = _allowed_folders(folder.path)
    _refuse_leaving_link(path, path.name, allowed)
    if not any(path.resolve().is_relative_to(parent) for parent in allowed):
        raise UnsafeModel(f"{folder.name_of(path)} is not in the model folder {folder.name}")


def _walk(root: Path, folder: NamedFolder, excluded: Collection[str]) -> Iterator[str]:
    """The names of all files below `root`, except hidden ones (of git, the hub client, a Mac)."""
    allowed = _allowed_folders(root)
    count = 0
    for parent, subfolders, files in os.walk(root, onerror=partial(_refuse_unreadable, folder)):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        files = [f for f in files if not f.startswith(".")]
        if parent == str(root):
            subfolders[:] = [s for s in subfolders if s not in excluded]
            files = [f for f in files if f not in excluded]
        for name in [*subfolders, *files]:
            path = Path(parent, name)
            relative = path.relative_to(root).as_posix()
            _refuse_leaving_link(path, relative, allowed)
            if name in subfolders:
                if path.is_symlink():
                    raise UnsafeModel(f"{relative} is a link to a folder, which is not followed")
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                raise UnsafeModel(f"{relative} is not a regular file")
            count += 1
            if count > MAX_FILES:
                raise ConfigError(
                    f"{folder.name_of(root)} has more than {MAX_FILES:,} files and is not a model "
                    "folder"
                )
            yield relative


def _allowed_folders(folder: Path) -> list[Path]:
    """Where links in a folder may lead: into it and, in the hub's cache, to the `blobs` there."""
    resolved = folder.resolve()
    blobs = [resolved.parents[1] / "blobs"] if resolved.parent.name == "snapshots" else []
    return [resolved, *blobs]


def _refuse_leaving_link(path: Path, name: str, allowed: Iterable[Path]) -> None:
    if not path.is_symlink():
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise IncompleteModel(f"{name} is a link that leads nowhere") from None
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise UnsafeModel(f"{name} is a link that leads out of the model folder")


def _refuse_unreadable(folder: NamedFolder, error: OSError) -> NoReturn:
    path = folder.name_of(Path(error.filename))
    raise ConfigError(f"{path} cannot be read: {error.strerror}")
