"""Archives of torch-model-archiver: their manifest, their handler and their files.

The format is that of torch-model-archiver 0.12: a flat folder of files with
`MAR-INF/MANIFEST.json`, in a zip (`.mar`), below the model's name in a `.tar.gz`, or as it is. The
example handlers for large models unpack a `model.zip` among the files when they start; the import
does so here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from model_store_scripts.layout import PICKLES
from model_store_scripts.safety import refuse_unsafe_path
from model_store_scripts.sources import NamedFolder, refuse_leaving
from model_store_scripts.store import staging
from model_store_scripts.unpacking import is_archive, unpack
from runners.config.files import MODEL_FOLDER, MODEL_HEADS, setup_files
from runners.config.model import SETUP_CONFIG
from runners.config.reading import read_json
from runners.config.torchserve import INDEX_TO_NAME, MODEL_CONFIG
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound, UnsafeModel
from runners.contracts.validation import problems_of
from runners.hf.safety import is_code

MAR_INF = "MAR-INF"
MANIFEST = f"{MAR_INF}/MANIFEST.json"
MODEL_ZIP = "model.zip"

Name = Annotated[str, Field(pattern=r"^[^\s/\\]{1,128}$")]


class Manifest(BaseModel):
    """The section `model` of `MANIFEST.json`; keys without effect here are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, protected_namespaces=(), frozen=True, hide_input_in_errors=True
    )

    model_name: Name
    model_version: Name = "1.0"
    handler: Annotated[str, Field(pattern=r"^[\w .:-]{1,128}$")]
    """A file, `file:function`, or the name of a handler that is part of TorchServe."""
    requirements_file: Name | None = None
    config_file: Name = MODEL_CONFIG

    @property
    def handler_file(self) -> str:
        """The name of the handler's file, if the archive has it."""
        stem = self.handler.partition(":")[0]
        return stem if stem.endswith(".py") else f"{stem}.py"

    @property
    def names_builtin_handler(self) -> bool:
        """Whether the handler, if the archive does not have it, is part of TorchServe."""
        return self.handler != self.handler_file and ":" not in self.handler


@dataclass(frozen=True)
class Archive:
    """An opened archive."""

    files: NamedFolder
    """The folder of its files, named as the archive."""
    manifest: Manifest
    model: NamedFolder | None
    """The model's folder, if it is not among the files."""
    handler: Path | None
    """The handler's file, if the archive has it."""
    excluded: frozenset[str]
    """Names at its top that are no part of a model."""
    notes: tuple[str, ...]
    """Why some of them are ignored."""

    def has_weights(self) -> bool:
        """Whether there is a weight file, or a folder for them."""
        suffixes = {".safetensors", *PICKLES}
        paths = self.files.path.rglob("*")
        return self.model is not None or any(path.suffix in suffixes for path in paths)


@contextmanager
def open_archive(
    path: Path, *, model_path: Path | None = None, max_bytes: int | None = None
) -> Iterator[Archive]:
    """An archive, unpacked until the block ends; a folder is opened where it is.

    `model_path`: the model's folder, if it is not in the archive. `max_bytes`: the maximum unpacked
    size of the archive, and of a `model.zip` in it; see `unpacking.unpack`.

    Raises: ModelNotFound, IncompleteModel, UnsafeModel, ConfigError.
    """
    path = path.expanduser()
    if path.is_dir():
        path = path.resolve()  # `.` has no name
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    if path.is_file() and not is_archive(path):
        raise ConfigError(
            f"{path} is not an archive of torch-model-archiver: neither a .mar, nor a .tar.gz, nor "
            "a folder"
        )
    model = None if model_path is None else NamedFolder(model_path, str(model_path))
    with staging() as stage:
        folder = path
        if not path.is_dir():
            unpack(path, stage / "archive", name=path.name, max_bytes=max_bytes)
            folder = _top(stage / "archive")
        archive = _read(NamedFolder(folder, path.name), model)
        if os.path.lexists(folder / MODEL_ZIP):
            archive = _with_model_zip(archive, stage / MODEL_FOLDER, max_bytes)
        if archive.model is not None and os.path.lexists(folder / INDEX_TO_NAME):
            reason = f"put it into the model's folder, {archive.model.name}"
            note = f"{INDEX_TO_NAME} is ignored: {reason}"
            archive = replace(archive, notes=(*archive.notes, note))
        yield archive


def _top(folder: Path) -> Path:
    """The folder of the manifest: a `.tar.gz` has all files below one folder."""
    tops = [path for path in folder.iterdir() if (path / MAR_INF).is_dir()]
    return tops[0] if len(tops) == 1 and not (folder / MAR_INF).is_dir() else folder


def _read(files: NamedFolder, model: NamedFolder | None) -> Archive:
    manifest = _manifest(files)
    names = sorted(os.listdir(files.path))
    for name in names:
        refuse_unsafe_path(name, container=files.name)
    excluded = {MAR_INF, MODEL_ZIP, *filter(is_code, names)}
    if manifest.requirements_file:
        excluded.add(manifest.requirements_file)
    has_handler = manifest.handler_file in names
    return Archive(
        files=files,
        manifest=manifest,
        model=model,
        handler=_regular_file(files, manifest.handler_file) if has_handler else None,
        excluded=frozenset(excluded),
        notes=tuple(_notes(files, names, manifest)),
    )


def _notes(files: NamedFolder, names: Collection[str], manifest: Manifest) -> Iterator[str]:
    if manifest.requirements_file in names:
        yield f"{manifest.requirements_file} is ignored: Triptych brings the packages it needs"
    for name in names:
        if is_code(name) and name != manifest.handler_file:
            yield f"{name} is ignored: it is code, which is never run"
    if not setup_files(files.path, manifest.config_file):
        yield f"{files.name} has neither {SETUP_CONFIG} nor {MODEL_CONFIG}: the defaults apply"


def _with_model_zip(archive: Archive, target: Path, max_bytes: int | None) -> Archive:
    """The archive with its `model.zip` unpacked into `target`, a folder in the staging folder."""
    name, folder = archive.files.name, archive.files.path
    if (folder / MODEL_FOLDER).exists():
        raise ConfigError(f"{name} has {MODEL_ZIP} and {MODEL_FOLDER}: remove one of them")
    if archive.model:
        raise ConfigError(f"{name} has {MODEL_ZIP}: --model-path is for an archive without a model")
    model_zip = _regular_file(archive.files, MODEL_ZIP)
    unpack(model_zip, target, name=f"{name}'s {MODEL_ZIP}", max_bytes=max_bytes)
    if folder.is_relative_to(target.parent):  # an unpacked copy, whose space the disk may need
        model_zip.unlink()
    unpacked = NamedFolder(target, MODEL_ZIP)
    model_path = _find_model(target)
    return replace(archive, model=NamedFolder(model_path, unpacked.name_of(model_path)))


def _find_model(folder: Path) -> Path:
    """The model's folder in an unpacked `model.zip`: the folder itself, or one below it."""
    candidates = {head.parent for name in MODEL_HEADS for head in folder.rglob(name)}
    tops = sorted(path for path in candidates if candidates.isdisjoint(path.parents))
    if len(tops) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in tops[:2])
        raise ConfigError(f"{MODEL_ZIP} contains several models, such as {names}: zip one of them")
    return tops[0] if tops else folder


def _regular_file(files: NamedFolder, name: str) -> Path:
    """A file of an archive. Raises: UnsafeModel if it is a folder, a pipe or leads out."""
    path = files.path / name
    refuse_leaving(path, files)
    if not path.is_file():
        raise UnsafeModel(f"{name} is not a regular file")
    return path


def _manifest(files: NamedFolder) -> Manifest:
    path = files.path / MANIFEST
    if not path.is_file():
        raise IncompleteModel(
            f"{files.name} has no {MANIFEST} and is not an archive of torch-model-archiver"
        )
    refuse_leaving(path, files)
    try:
        manifest = Manifest.model_validate(read_json(path, files.name_of(path)).get("model"))
    except ValidationError as error:
        problems = [f"{p.field or 'value'}: {p.requirement}" for p in problems_of(error)]
        raise ConfigError(f"{files.name}: {MANIFEST}: model: {'; '.join(problems)}") from None
    for text in (manifest.model_name, manifest.model_version, manifest.config_file):
        refuse_unsafe_path(text, container=files.name)  # they are printed, or name a file
    return manifest
