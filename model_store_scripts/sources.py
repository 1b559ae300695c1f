"""Where a model comes from: a folder here, or a hub repository (`hub.py`), behind one face."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from runners.config import SETUP_CONFIG
from runners.errors import ConfigError, IncompleteModel, ModelNotFound, UnsafeModel

MODEL_HEADS = ("model_index.json", "config.json")
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
    def setup_config(self) -> Path | None:
        """The `setup_config.json` that came along."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """What lies beside the model and is no part of it."""

    def fetch(self, names: Iterable[str]) -> None:
        """Make these files present under `root`. Raises: ConfigError."""


class FolderSource:
    """A model folder on this machine, plain or TorchServe's (`model/` beside `setup_config.json`).

    Raises: ModelNotFound, IncompleteModel (no model in it), UnsafeModel (a link that leads out of
    it, a device or pipe, an absurd file name), ConfigError (unreadable, or far too many files).
    """

    revision: str | None = None
    checksums: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self.root = _model_root(folder)
        self.names = frozenset(_walk(self.root))
        beside = () if self.root == folder else sorted(os.listdir(folder))
        self.ignored = tuple(n for n in beside if n not in (self.root.name, SETUP_CONFIG))
        candidates = (folder / SETUP_CONFIG, self.root / SETUP_CONFIG)
        self.setup_config = next((c for c in candidates if c.is_file()), None)
        if self.root != folder:
            for path in filter(None, (self.root, self.setup_config)):
                _refuse_leaving_link(path, path.name, folder.resolve())

    def fetch(self, names: Iterable[str]) -> None:
        """A folder has all its files already."""


def _model_root(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is not a folder")
    for root in (folder, folder / "model"):
        if any((root / head).is_file() for head in MODEL_HEADS):
            return root
    raise IncompleteModel(
        f"{folder} is not a model folder: it has neither config.json (text) "
        "nor model_index.json (image)"
    )


def _walk(root: Path) -> Iterator[str]:
    """Every file below `root`, hidden folders (git's, the hub client's) aside."""
    allowed = (root.resolve(), _hub_blobs(root))
    count = 0
    for folder, subfolders, files in os.walk(root, onerror=_unreadable):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
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
