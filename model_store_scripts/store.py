"""The BentoML model store: what is in it, and adding a model at one stroke.

A model is gathered in a folder beside the store and moved in whole: the store never shows half a
model, however the import ends, and large weights are written once.
"""

from __future__ import annotations

import contextlib
import fcntl
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

from runners.config.model import SETUP_CONFIG
from runners.contracts.errors import ConfigError

# BentoML reports each saved model's size to its makers unless told not to; "True", not "1".
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

_STAGING = "triptych-import-"


@dataclass(frozen=True)
class StoredModel:
    """A model in the store that Triptych imported."""

    tag: str
    metadata: Mapping[str, Any]
    setup_config: Mapping[str, Any]


def stored_models(name: str | None = None) -> list[StoredModel]:
    """The models in the store that Triptych imported, oldest first; all, or one name's."""
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
    """An empty folder on the store's disk, gone at the end. Clears what killed imports left."""
    beside = Path(BentoMLContainer.tmp_bento_store_dir.get())
    for old in beside.glob(f"{_STAGING}*"):
        with _locked(old) as free:
            if free:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=beside))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(
    name: str,
    folder: Path,
    *,
    setup_config: Mapping[str, Any],
    labels: Mapping[str, str],
    metadata: Mapping[str, Any],
) -> str:
    """Move a folder that holds `model/` into the store as a new version; returns its tag.

    Raises: ConfigError if the store refuses it. Whatever happens, the store has all or nothing.
    """
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
    """Let the bare name mean this version, as if it had been imported just now."""
    parsed = Tag.from_str(tag)
    latest = Path(BentoMLContainer.model_store_dir.get(), parsed.latest_path())
    latest.write_text(str(parsed.version))


class _MovingStore(ModelStore):
    """A store that takes an item's big files by renaming their folder instead of copying them.

    BentoML writes an item into a temporary folder and copies that into the store. It gets to copy
    `model.yaml` only, and copies it into the folder that has the rest.
    """

    def __init__(self, path: str, folder: Path) -> None:
        super().__init__(path)
        self._folder = folder

    @contextlib.contextmanager
    def register(self, tag: str | Tag) -> Iterator[str]:
        with super().register(tag) as item:
            yield str(self._folder)
            try:
                os.rename(self._folder, item)
            except OSError:  # the store's models lie on a disk of their own
                shutil.copytree(self._folder, item, dirs_exist_ok=True)


def _setup_config(item: str) -> Path:
    return Path(item, SETUP_CONFIG)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, if nobody else does; a killed process holds none."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
