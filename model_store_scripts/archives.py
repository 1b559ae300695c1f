"""What torch-model-archiver makes, opened: its manifest, its handler and where its files lie.

The format is that of torch-model-archiver 0.12: files side by side, `MAR-INF/MANIFEST.json` among
them, in a zip (`.mar`), below the model's name in a `.tar.gz`, or in a plain folder. The example
handlers for large models unpack a `model.zip` of theirs when they start; here the import does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from model_store_scripts.safety import is_code, refuse_unsafe_path
from model_store_scripts.sources import refuse_leaving
from model_store_scripts.unpacking import is_archive, unpack
from runners.config import explain
from runners.config_files import MODEL_FOLDER
from runners.config_reading import read_json
from runners.errors import ConfigError, IncompleteModel, ModelNotFound
from runners.torchserve_config import MODEL_CONFIG

MAR_INF = "MAR-INF"
MANIFEST = f"{MAR_INF}/MANIFEST.json"
MODEL_ZIP = "model.zip"
SHOWN_LINES = 120
SHOWN_BYTES = 8192

Name = Annotated[str, Field(pattern=r"^[^\s/\\]{1,128}$")]


class Manifest(BaseModel):
    """The section `model` of `MANIFEST.json`, as far as it means something here."""

    model_config = ConfigDict(
        alias_generator=to_camel, protected_namespaces=(), frozen=True, hide_input_in_errors=True
    )

    model_name: Name
    model_version: Name = "1.0"
    handler: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")]
    """A file, `file:function`, or the name of one that TorchServe has."""
    requirements_file: Name | None = None
    config_file: Name = MODEL_CONFIG

    @property
    def handler_file(self) -> str:
        """What the handler's file is called, if the archive has it."""
        stem = self.handler.partition(":")[0]
        return stem if stem.endswith(".py") else f"{stem}.py"


@dataclass(frozen=True)
class Archive:
    """An archive whose files lie in a folder."""

    name: str
    """What the user calls it."""
    folder: Path
    manifest: Manifest
    unzipped: Path | None
    """Where its `model.zip` was unpacked, if it has one."""
    handler: str | None
    """The handler's text, safe to print; empty if that is long or no text; None: it has none."""
    set_aside: frozenset[str]
    """What lies at its top and is no part of a model."""
    notes: tuple[str, ...]
    """Why not."""

    def named(self, message: str) -> str:
        """A message with the archive's name in place of where it was unpacked."""
        places = [self.folder, *([self.unzipped] if self.unzipped else [])]
        for place, called in zip(places, (self.name, MODEL_ZIP), strict=False):
            message = message.replace(str(place), called)
        return message


@contextmanager
def open_archive(path: Path, *, max_bytes: int | None = None) -> Iterator[Archive]:
    """An archive, unpacked for as long as the block lasts; a folder stays where it is.

    `max_bytes`: to how much it, and a `model.zip` in it, may unpack; see `unpacking.unpack`.

    Raises: ModelNotFound, IncompleteModel, UnsafeModel, ConfigError: one sentence each.
    """
    path = path.expanduser()
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    if path.is_file() and not is_archive(path):
        raise ConfigError(
            f"{path} is no .mar, no .tar.gz and no folder, which is what torch-model-archiver makes"
        )
    # From here on the store is needed: it has a place for what is large and goes again.
    from model_store_scripts.store import staging

    with staging() as stage:
        if path.is_dir():
            folder = path
        else:
            unpack(path, stage / "archive", name=path.name, max_bytes=max_bytes)
            folder = _top(stage / "archive")
        yield _look(path.name, folder, stage / MODEL_FOLDER, max_bytes)


def _top(folder: Path) -> Path:
    """Where a manifest lies: a `.tar.gz` has all below one folder."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and (inside[0] / MAR_INF).is_dir() else folder


def _look(name: str, folder: Path, unzipped: Path, max_bytes: int | None) -> Archive:
    manifest = _manifest(name, folder)
    found = sorted(os.listdir(folder))
    for each in found:
        refuse_unsafe_path(each)
    packed = folder / MODEL_ZIP
    if MODEL_ZIP in found:
        if MODEL_FOLDER in found:
            raise ConfigError(f"{name} has {MODEL_ZIP} and {MODEL_FOLDER}: which is the model?")
        refuse_leaving(packed, folder)
        unpack(packed, unzipped, name=f"{name}'s {MODEL_ZIP}", max_bytes=max_bytes)
        if folder.is_relative_to(unzipped.parent):  # a copy of ours: the disk may need its room
            packed.unlink()
    code = {n for n in found if is_code(n)}
    requirements = {manifest.requirements_file} & set(found)
    notes = [f"{n} is ignored: Triptych brings the packages it needs" for n in requirements]
    notes += [
        f"{n} is ignored: it is code, which is never run"
        for n in sorted(code - {manifest.handler_file})
    ]
    return Archive(
        name=name,
        folder=folder,
        manifest=manifest,
        unzipped=unzipped if MODEL_ZIP in found else None,
        handler=_shown(folder, manifest.handler_file) if manifest.handler_file in found else None,
        set_aside=frozenset({MAR_INF, MODEL_ZIP, *code, *filter(None, requirements)}),
        notes=tuple(notes),
    )


def _manifest(name: str, folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise IncompleteModel(f"{name} has no {MANIFEST}: torch-model-archiver did not make it")
    refuse_leaving(path, folder)
    try:
        manifest = Manifest.model_validate(read_json(path).get("model"))
    except ValidationError as error:
        raise ConfigError(f"{name}: {MANIFEST}: model: {explain(error)}") from None
    for text in (manifest.model_name, manifest.model_version, manifest.config_file):
        refuse_unsafe_path(text)  # they are printed, or lead to a file
    return manifest


def _shown(folder: Path, name: str) -> str:
    """A file's text, without what a terminal would obey."""
    refuse_leaving(folder / name, folder)
    content = (folder / name).read_bytes()[: SHOWN_BYTES + 1]
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ""
    if len(content) > SHOWN_BYTES or text.count("\n") > SHOWN_LINES:
        return ""
    lines = text.expandtabs().splitlines()
    return "\n".join(
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in x) for x in lines
    )
