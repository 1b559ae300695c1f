"""Bringing a model into the BentoML store: look, refuse or take, copy, describe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store_scripts import layout
from model_store_scripts.copying import copy_files, total_bytes
from model_store_scripts.safety import refuse_unsafe_configs, refuse_unsafe_names
from model_store_scripts.setup_files import Given, read_given
from model_store_scripts.sources import FolderSource, Source
from runners.config.files import MODEL_FOLDER, MODEL_HEADS, task_of
from runners.config.model import validate
from runners.config.reading import read_json
from runners.config.torchserve import MODEL_CONFIG
from runners.contracts.errors import ConfigError, ModelNotFound
from runners.hf.weights import count_parameters, main_dtype

if TYPE_CHECKING:
    from model_store_scripts.store import StoredModel


@dataclass(frozen=True)
class ImportRequest:
    """What to import, and how the store shall have it."""

    source: str
    """A folder, or the id of a hub model."""
    name: str
    """The model's name in the store."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Fields of `setup_config.json` that win over the source's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    setup_config: Path | None = None
    """A published `setup_config.json` or `model-config.yaml` to take over in place of the source's
    own."""
    convert_checkpoints: bool = False
    """Whether pickled weights are converted; else they are refused."""
    origin: str | None = None
    """What is written down as where the model came from, if not `source`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """More to write down about the model; differing, it makes a new version too."""
    force: bool = False
    """Whether to make a new version even if the store has the very same model."""
    model_path: Path | None = None
    """Where the model lies, if not in the folder that says how it is run."""
    model_config: str = MODEL_CONFIG
    """What TorchServe's `model-config.yaml` is called in that folder."""
    set_aside: frozenset[str] = frozenset()
    """What lies at the top of that folder, is no part of a model and is not spoken of here."""


@dataclass(frozen=True)
class ImportedModel:
    """A model in the store, and what is worth saying about how it got there."""

    tag: str
    task: str
    new: bool
    """False if the store had the very same model under this name already."""
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]
    setup_config: Mapping[str, Any] = field(default_factory=dict)
    """How it is run."""


@dataclass(frozen=True)
class _Looked:
    """A source that was looked through and found fit to import."""

    source: Source
    setup_config: dict[str, Any]
    small: list[str]
    weights: layout.Chosen
    notes: list[str]


def import_model(request: ImportRequest) -> ImportedModel:
    """Import a model into the BentoML store; the same one twice under a name is taken once.

    Raises: ConfigError and its kin, one sentence each; the store is then as it was.
    """
    check_name(request.name)
    looked = _look(request)
    # From here on the store is needed; until here a refusal came without the cost of its import.
    from model_store_scripts import store

    with store.staging() as stage:
        files = _files(looked, stage / "converted")
        metadata = _describe(request, looked, files) | {"total_bytes": total_bytes(files)}
        stored = None if request.force else _find(request, looked, files, metadata)
        if stored:
            store.make_latest(stored.tag)
            return _result(stored.tag, looked, stored.metadata, new=False)
        item = stage / "item"
        metadata["fingerprint"] = copy_files(
            files, item / MODEL_FOLDER, checksums=looked.source.checksums
        )
        tag = store.save(
            request.name,
            item,
            setup_config=looked.setup_config,
            labels={key: metadata[key] for key in ("task", "engine")},
            metadata=metadata,
        )
        return _result(tag, looked, metadata, new=True)


def check_name(name: str) -> None:
    """Raises: ConfigError if the store can not hold a model of this name."""
    if len(name) > 63 or not re.fullmatch("[a-z0-9]([-._a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"{name!r} is not a model name: up to 63 of a-z, 0-9, '-', '_' and '.', "
            "a letter or digit first and last"
        )


def _look(request: ImportRequest) -> _Looked:
    """Everything that can be refused before a byte is copied or a weight downloaded."""
    folder = Path(request.source).expanduser()
    given = read_given(
        folder,
        file=request.setup_config,
        engine=request.overrides.get("engine"),
        model_path=request.model_path,
        model_config=request.model_config,
    )
    source = _open(request, folder, given)
    refuse_unsafe_names(source.names)
    heads = [name for name in MODEL_HEADS if name in source.names]
    source.fetch(heads)
    refuse_unsafe_configs(source.root, heads)
    parts = layout.parts_of(source.root)
    read = {name for name in source.names if source.root / name in given.files}
    small = layout.small_files(parts, source.names - read)
    source.fetch([*small, *layout.indexes(parts, source.names)])
    layout.refuse_pointers(source.root, small)
    refuse_unsafe_configs(source.root, small)
    layout.refuse_incomplete(parts, source.names)
    setup_config, warnings = _setup_config(request, source, given)
    weights = layout.choose_weights(
        source.root, parts, source.names, convert=request.convert_checkpoints
    )
    pickles = [name for part in weights.pickles for name in part.files]
    others = sorted(source.names - {*small, *weights.files, *pickles, *read})
    notes = warnings + given.notes + _left_out([*_beside(request, folder, source, given), *others])
    source.fetch([*weights.files, *pickles])
    layout.refuse_pointers(source.root, [*weights.files, *pickles])
    return _Looked(source, setup_config, small, weights, notes)


def _beside(request: ImportRequest, folder: Path, source: Source, given: Given) -> list[str]:
    """What lies beside the model, and was not read."""
    names = sorted(os.listdir(folder)) if request.model_path else source.ignored
    return [n for n in names if n not in request.set_aside and folder / n not in given.files]


def _left_out(names: list[str]) -> list[str]:
    names = [name for name in names if not name.startswith(".")]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"left out: {', '.join(names[:5])}{more}"] if names else []


def _open(request: ImportRequest, folder: Path, given: Given) -> Source:
    if given.root:
        if request.revision:
            raise ConfigError(f"{request.source} is a folder here and has no revisions")
        return FolderSource(request.model_path or folder, given.root, request.set_aside)
    from model_store_scripts.hub import HubSource, is_hub_id

    if folder.exists() or not is_hub_id(request.source):
        raise ModelNotFound(f"{request.source} is neither a folder nor the id of a hub model")
    revision = request.revision or given.setup.values.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise ConfigError(f"{request.setup_config}: revision must be a text")
    return HubSource(request.source, revision)


def _setup_config(
    request: ImportRequest, source: Source, given: Given
) -> tuple[dict[str, Any], list[str]]:
    overrides = {k: v for k, v in request.overrides.items() if v is not None}
    setup = given.setup.with_task(source.root, task=overrides.get("task"))
    values = setup.values | overrides
    if source.revision:
        values["revision"] = source.revision
    derived = {"name": request.name, "model_path": source.root}
    config = validate(values | derived, source=setup.source)
    task = task_of(source.root)
    conversing = (task, config.task) == ("text-generation", "conversational")
    if config.task != task and not conversing:
        raise ConfigError(f"the model is for {task}, not for {config.task}")
    chosen = config.model_dump(mode="json", exclude_unset=True, exclude={"name", "model_path"})
    return {"engine": config.engine, "task": task} | chosen, setup.warnings


def _files(looked: _Looked, converted: Path) -> dict[str, Path]:
    """What goes into the store: name to where the file lies now."""
    root = looked.source.root
    files = {name: root / name for name in [*looked.small, *looked.weights.files]}
    if looked.weights.pickles:
        from model_store_scripts.convert import convert

        new = convert(looked.weights.pickles, root, converted)
        files |= {name: converted / name for name in new}
    return files


def _describe(request: ImportRequest, looked: _Looked, files: Mapping[str, Path]) -> dict[str, Any]:
    parameters = count_parameters(layout.read_headers(files).values())
    revision = looked.source.revision
    return {
        "architecture": _architecture(looked.source.root),
        "parameters": parameters.total(),
        "dtype": main_dtype(parameters),
        "task": looked.setup_config["task"],
        "engine": looked.setup_config["engine"],
        "source": request.origin or request.source,
        **({"revision": revision} if revision else {}),
        **request.metadata,
    }


def _architecture(root: Path) -> str:
    if task_of(root) == "text-to-image":
        return str(read_json(root / "model_index.json")["_class_name"])
    config = read_json(root / "config.json")
    return str((config.get("architectures") or ["unknown"])[0])


def _find(
    request: ImportRequest, looked: _Looked, files: Mapping[str, Path], metadata: Mapping[str, Any]
) -> StoredModel | None:
    """The very same model, if the store has it under this name."""
    from model_store_scripts.store import stored_models

    wanted = {**request.metadata, "total_bytes": metadata["total_bytes"]}
    alike = [
        stored
        for stored in stored_models(request.name)
        if wanted.items() <= stored.metadata.items()
        and _but_revision(stored.setup_config) == _but_revision(looked.setup_config)
    ]
    if not alike:
        return None
    fingerprint = copy_files(files, None, checksums=looked.source.checksums)
    return next((s for s in reversed(alike) if s.metadata["fingerprint"] == fingerprint), None)


def _but_revision(config: Mapping[str, Any]) -> dict[str, Any]:
    """A commit that changed no file of the model changes nothing."""
    return {key: value for key, value in config.items() if key != "revision"}


def _result(tag: str, looked: _Looked, metadata: Mapping[str, Any], *, new: bool) -> ImportedModel:
    setup_config = looked.setup_config
    notes = tuple(looked.notes)
    return ImportedModel(tag, setup_config["task"], new, metadata, notes, setup_config)
