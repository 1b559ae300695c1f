"""The BentoML model store: the models in it, and adding one atomically.

A model is gathered in a folder next to the store and moved in whole: the store never shows half a
model, however the import ends, and large weights are written once. Called by the import commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bentoml.models
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.models import ModelStore
from bentoml._internal.tag import Tag
from bentoml.exceptions import BentoMLException
from filelock import FileLock
from typing_extensions import override

from runners.config.model import SETUP_CONFIG
from runners.contracts.errors import ConfigError

_STAGING_PREFIX = "triptych-import-"
_LOCK = "lock"


@dataclass(frozen=True)
class StoredModel:
    """A model in the store that Triptych imported."""

    tag: str
    metadata: Mapping[str, Any]
    setup_config: Mapping[str, Any]


def stored_models(name: str | None = None) -> list[StoredModel]:
    """The models in the store that Triptych imported, oldest first: all, or those of one name."""
    try:
        models = bentoml.models.list(name)
    except BentoMLException:  # no model of this name
        return []
    models.sort(key=lambda model: model.creation_time)
    return [
        StoredModel(str(m.tag), m.info.metadata, json.loads(_setup_config(m.path).read_text()))
        for m in models
        if "fingerprint" in m.info.metadata and _setup_config(m.path).is_file()
    ]


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """An empty folder on the store's disk, deleted at the end.

    It is locked while in use, so that folders of killed imports, whose locks ended with them, can
    be told from those in use; they are deleted here.
    """
    parent = Path(BentoMLContainer.tmp_bento_store_dir.get())
    for folder in parent.glob(f"{_STAGING_PREFIX}*"):
        _delete_unless_locked(folder)
    folder = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=parent))
    try:
        with FileLock(folder / _LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delete_unless_locked(folder: Path) -> None:
    # Timeout is an OSError; others mean that the folder is another user's.
    with contextlib.suppress(OSError), FileLock(folder / _LOCK, blocking=False):
        shutil.rmtree(folder, ignore_errors=True)


def save(
    name: str,
    folder: Path,
    *,
    setup_config: Mapping[str, Any],
    labels: Mapping[str, str],
    metadata: Mapping[str, Any],
) -> str:
    """Move a folder that contains `model/` into the store as a new version; returns its tag.

    Raises: ConfigError if the store refuses it. The store then has none of it.
    """
    # BentoML sends the size of each saved model to its makers unless this is set; "True", not "1".
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    (folder / SETUP_CONFIG).write_text(json.dumps(setup_config, indent=2) + "\n")
    tag = Tag.from_str(name).make_new_version()
    store = _MovingStore(BentoMLContainer.model_store_dir.get(), folder)
    try:
        with bentoml.models.create(
            tag, labels=dict(labels), metadata=dict(metadata), _model_store=store
        ):
            pass
    except BaseException as error:
        item = Path(BentoMLContainer.model_store_dir.get(), tag.path())
        shutil.rmtree(item, ignore_errors=True)
        with contextlib.suppress(OSError):
            item.parent.rmdir()
        if isinstance(error, BentoMLException | OSError):
            raise ConfigError(f"the model store refuses {tag}: {error}") from None
        raise
    return str(tag)


def make_latest(tag: str) -> None:
    """Make the name without a version mean this version, as if it had just been imported."""
    parsed = Tag.from_str(tag)
    latest = Path(BentoMLContainer.model_store_dir.get(), parsed.latest_path())
    latest.write_text(str(parsed.version))


class _MovingStore(ModelStore):
    """A store that takes an item's large files by renaming their folder instead of copying them.

    BentoML writes an item into a temporary folder and copies that into the store. Here it copies
    only `model.yaml`, into the folder that has the rest.
    """

    def __init__(self, path: str, folder: Path) -> None:
        super().__init__(path)
        self._folder = folder

    @override
    @contextlib.contextmanager
    def register(self, tag: str | Tag) -> Iterator[str]:
        with super().register(tag) as item:
            yield str(self._folder)
            try:
                os.rename(self._folder, item)
            except OSError:  # the store's models are on another disk
                shutil.copytree(self._folder, item, dirs_exist_ok=True)


def _setup_config(item: str) -> Path:
    return Path(item, SETUP_CONFIG)
