"""The files of a source that say how the model is run: `setup_config.json`, `model-config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store_scripts.safety import refuse_code_keys
from model_store_scripts.sources import NamedFolder, refuse_leaving
from runners.config.files import SetupValues, find_model, read_setup, setup_files
from runners.config.reading import read_object
from runners.config.torchserve import MODEL_CONFIG
from runners.contracts.errors import ModelNotFound


@dataclass(frozen=True)
class SetupFiles:
    """Fields of a RunnerConfig, and the files that they were read from."""

    fields: SetupValues
    notes: list[str]
    """About the model's folder."""
    files: frozenset[Path]
    """Part of the stored `setup_config.json`, not of the model."""
    root: Path | None
    """The model's folder in the source; None if the source is not a folder."""


def read_setup_files(
    source: NamedFolder,
    *,
    file: Path | None,
    engine: object,
    model: NamedFolder | None = None,
    model_config: str = MODEL_CONFIG,
) -> SetupFiles:
    """Read `file`, else the files in the source if that is a folder.

    `model`: the model's folder, if it is not in the source. `model_config`: the name of
    TorchServe's file in the source. `engine` takes precedence over the files', if it is not None.

    Raises: ModelNotFound (no such file), IncompleteModel (no model in the folder), UnsafeModel (a
    path that leads out of the source, or a request for code), ConfigError.
    """
    if file and not file.is_file():
        raise ModelNotFound(f"{file} does not exist")
    is_folder = source.path.is_dir()
    paths: set[Path] = set()

    def read(path: Path) -> dict[str, Any]:
        # A file that the user chose may be anywhere.
        if not file:
            refuse_leaving(path, source)
        content = read_object(path, source.name_of(path))
        refuse_code_keys(content, path.name)
        paths.add(path)
        return content

    files = [file] if file else setup_files(source.path, model_config) if is_folder else []
    fields = read_setup(files, engine=engine, read=read)
    values, notes = fields.values, list[str]()
    model_path = values.pop("model_path", None)
    if not file and Path(str(values.get("offload_folder", ""))).is_absolute():
        del values["offload_folder"]
        notes.append("offload_folder is ignored: only --offload-folder may name an absolute path")
    root = None
    if is_folder:
        folder = model or source
        root, path_notes = find_model(
            folder.path, None if file or model else model_path, name_of=folder.name_of
        )
        notes += path_notes
    return SetupFiles(fields, notes, frozenset(paths), root)
