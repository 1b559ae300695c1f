"""What comes with a model about how to run it: `setup_config.json`, `model-config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store_scripts.safety import refuse_code_keys
from model_store_scripts.sources import refuse_leaving
from runners.config.files import SetupValues, find_model, read_setup, setup_files
from runners.config.reading import read_object
from runners.config.torchserve import MODEL_CONFIG
from runners.contracts.errors import ModelNotFound


@dataclass(frozen=True)
class Given:
    """Fields of a RunnerConfig, with what was read for them."""

    setup: SetupValues
    notes: list[str]
    """About where the model lies."""
    files: frozenset[Path]
    """What they were read from: part of the stored `setup_config.json`, not of the model."""
    root: Path | None
    """Where in the folder the model lies; None for what is no folder."""


def read_given(
    source: Path,
    *,
    file: Path | None,
    engine: object,
    model_path: Path | None = None,
    model_config: str = MODEL_CONFIG,
) -> Given:
    """What `file` says, else what lies in the source if that is a folder.

    `model_path`: where the model lies, if not in the source. `model_config`: what TorchServe's file
    is called there. `engine` wins over the files' own, if it is not None.

    Raises: ModelNotFound (no such file), IncompleteModel (no model in the folder), UnsafeModel (it
    names what lies outside of it, or asks for code), ConfigError.
    """
    if file and not file.is_file():
        raise ModelNotFound(f"{file} does not exist")
    is_folder = source.is_dir()
    seen: set[Path] = set()

    def read(path: Path) -> dict[str, Any]:
        # A file that the user chose may lie anywhere.
        if not file:
            refuse_leaving(path, source)
        content = read_object(path)
        refuse_code_keys(content, path.name)
        seen.add(path)
        return content

    files = [file] if file else setup_files(source, model_config) if is_folder else []
    setup = read_setup(files, engine=engine, read=read)
    values, notes = setup.values, list[str]()
    named = values.pop("model_path", None)
    if not file and Path(str(values.get("offload_folder", ""))).is_absolute():
        del values["offload_folder"]
        notes.append(
            "offload_folder is ignored: an absolute one is taken by --offload-folder alone"
        )
    root = None
    if is_folder:
        root, more = find_model(model_path or source, None if file or model_path else named)
        notes = notes + more
    return Given(setup, notes, frozenset(seen), root)
