"""What torch-model-archiver makes, opened: its manifest, its handler and where its files lie.

The format is that of torch-model-archiver 0.12: files side by side, `MAR-INF/MANIFEST.json` among
them, in a zip (`.mar`), below the model's name in a `.tar.gz`, or in a plain folder. The example
handlers for large models unpack a `model.zip` of theirs when they start; here the import does.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from model_store_scripts.safety import refuse_unsafe_path
from model_store_scripts.sources import refuse_leaving
from model_store_scripts.unpacking import is_archive, unpack
from runners.config.files import MODEL_FOLDER, MODEL_HEADS, setup_files
from runners.config.model import SETUP_CONFIG
from runners.config.reading import read_json
from runners.config.torchserve import MODEL_CONFIG
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound, UnsafeModel
from runners.contracts.validation import problems_of
from runners.hf.safety import is_code

MAR_INF = "MAR-INF"
MANIFEST = f"{MAR_INF}/MANIFEST.json"
MODEL_ZIP = "model.zip"

Name = Annotated[str, Field(pattern=r"^[^\s/\\]{1,128}$")]


class Manifest(BaseModel):
    """The section `model` of `MANIFEST.json`, as far as it means something here."""

    model_config = ConfigDict(
        alias_generator=to_camel, protected_namespaces=(), frozen=True, hide_input_in_errors=True
    )

    model_name: Name
    model_version: Name = "1.0"
    handler: Annotated[str, Field(pattern=r"^[\w .:-]{1,128}$")]
    """A file, `file:function`, or the name of one that TorchServe has."""
    requirements_file: Name | None = None
    config_file: Name = MODEL_CONFIG

    @property
    def handler_file(self) -> str:
        """What the handler's file is called, if the archive has it."""
        stem = self.handler.partition(":")[0]
        return stem if stem.endswith(".py") else f"{stem}.py"

    @property
    def is_torchserves(self) -> bool:
        """Whether the handler, if the archive does not have it, is one that TorchServe has."""
        return self.handler != self.handler_file and ":" not in self.handler


@dataclass(frozen=True)
class Archive:
    """An archive whose files lie in a folder."""

    name: str
    """What the user calls it."""
    folder: Path
    manifest: Manifest
    model_path: Path | None
    """Where the model lies, if not among these files."""
    handler: Path | None
    """The handler's file, if it has one."""
    set_aside: frozenset[str]
    """What lies at its top and is no part of a model."""
    notes: tuple[str, ...]
    """Why not."""
    places: Mapping[Path, str]
    """Where it was unpacked, and what the user calls that."""

    def named(self, message: str) -> str:
        """A message with what the user calls a place instead of where it was unpacked."""
        return _named(message, self.places)


@contextmanager
def open_archive(
    path: Path, *, model_path: Path | None = None, max_bytes: int | None = None
) -> Iterator[Archive]:
    """An archive, unpacked for as long as the block lasts; a folder stays where it is.

    `model_path`: where its model lies, if not in it. `max_bytes`: to how much it, and a `model.zip`
    in it, may unpack; see `unpacking.unpack`. Errors in the block name places as the user does.

    Raises: ModelNotFound, IncompleteModel, UnsafeModel, ConfigError: one sentence each.
    """
    path = path.expanduser()
    if path.is_dir():
        path = path.resolve()  # `.` has no name
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    if path.is_file() and not is_archive(path):
        raise ConfigError(
            f"{path} is no .mar, no .tar.gz and no folder, which is what torch-model-archiver makes"
        )
    # From here on the store is needed: it has a place for what is large and goes again.
    from model_store_scripts.store import staging

    with staging() as stage:
        folder = path
        if not path.is_dir():
            unpack(path, stage / "archive", name=path.name, max_bytes=max_bytes)
            folder = _top(stage / "archive")
        places = {folder: path.name, stage / MODEL_FOLDER: MODEL_ZIP}
        try:
            archive = _look(path.name, folder, model_path, places)
            if os.path.lexists(folder / MODEL_ZIP):
                archive = _unzipped(archive, stage / MODEL_FOLDER, max_bytes)
            yield archive
        except ConfigError as error:
            raise type(error)(_named(error.message, places)) from None


def _top(folder: Path) -> Path:
    """Where a manifest lies: a `.tar.gz` has all below one folder."""
    tops = [place for place in folder.iterdir() if (place / MAR_INF).is_dir()]
    return tops[0] if len(tops) == 1 and not (folder / MAR_INF).is_dir() else folder


def _named(message: str, places: Mapping[Path, str]) -> str:
    for place, called in places.items():
        message = message.replace(str(place), called)
    return message


def _look(name: str, folder: Path, model_path: Path | None, places: Mapping[Path, str]) -> Archive:
    manifest = _manifest(name, folder)
    found = sorted(os.listdir(folder))
    for each in found:
        refuse_unsafe_path(each, container=name)
    set_aside = {MAR_INF, MODEL_ZIP, *filter(is_code, found)}
    if manifest.requirements_file:
        set_aside.add(manifest.requirements_file)
    has_handler = manifest.handler_file in found
    return Archive(
        name=name,
        folder=folder,
        manifest=manifest,
        model_path=model_path,
        handler=_plain(folder, manifest.handler_file) if has_handler else None,
        set_aside=frozenset(set_aside),
        notes=tuple(_notes(name, folder, found, manifest)),
        places=places,
    )


def _notes(name: str, folder: Path, found: Collection[str], manifest: Manifest) -> Iterator[str]:
    if manifest.requirements_file in found:
        yield f"{manifest.requirements_file} is ignored: Triptych brings the packages it needs"
    for each in found:
        if is_code(each) and each != manifest.handler_file:
            yield f"{each} is ignored: it is code, which is never run"
    if not setup_files(folder, manifest.config_file):
        yield f"{name} has neither {SETUP_CONFIG} nor {MODEL_CONFIG}: the defaults are taken"


def _unzipped(archive: Archive, target: Path, max_bytes: int | None) -> Archive:
    """The archive with its `model.zip` unpacked into `target`, a folder in the staging one."""
    name, folder = archive.name, archive.folder
    if (folder / MODEL_FOLDER).exists():
        raise ConfigError(f"{name} has {MODEL_ZIP} and {MODEL_FOLDER}: which is the model?")
    if archive.model_path:
        raise ConfigError(f"{name} has {MODEL_ZIP}: --model-path is for an archive without a model")
    packed = _plain(folder, MODEL_ZIP)
    unpack(packed, target, name=f"{name}'s {MODEL_ZIP}", max_bytes=max_bytes)
    if folder.is_relative_to(target.parent):  # a copy of ours: the disk may need its room
        packed.unlink()
    return replace(archive, model_path=_model_in(target))


def _model_in(folder: Path) -> Path:
    """Where in an unpacked `model.zip` the model lies: at its top, or somewhere below it."""
    holding = {head.parent for name in MODEL_HEADS for head in folder.rglob(name)}
    tops = sorted(place for place in holding if holding.isdisjoint(place.parents))
    if len(tops) > 1:
        names = " and ".join(str(place.relative_to(folder)) for place in tops[:2])
        raise ConfigError(f"{MODEL_ZIP} holds several models, such as {names}: zip one of them")
    return tops[0] if tops else folder


def _plain(folder: Path, name: str) -> Path:
    """A file of an archive. Raises: UnsafeModel if it is a folder, a pipe or leads out."""
    refuse_leaving(folder / name, folder)
    if not (folder / name).is_file():
        raise UnsafeModel(f"{name} is not a regular file")
    return folder / name


def _manifest(name: str, folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise IncompleteModel(f"{name} has no {MANIFEST}: torch-model-archiver did not make it")
    refuse_leaving(path, folder)
    try:
        manifest = Manifest.model_validate(read_json(path).get("model"))
    except ValidationError as error:
        problems = [f"{p.field or 'value'}: {p.requirement}" for p in problems_of(error)]
        raise ConfigError(f"{name}: {MANIFEST}: model: {'; '.join(problems)}") from None
    for text in (manifest.model_name, manifest.model_version, manifest.config_file):
        refuse_unsafe_path(text, container=name)  # they are printed, or lead to a file
    return manifest
