"""Importing a model into the BentoML model store: inspect it, refuse or copy it, describe it.

Called by the import commands.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store_scripts import layout
from model_store_scripts.copying import copy_files, total_bytes
from model_store_scripts.safety import refuse_unsafe_configs, refuse_unsafe_names
from model_store_scripts.setup_files import SetupFiles, read_setup_files
from model_store_scripts.sources import FolderSource, NamedFolder, Source, is_hub_id
from runners.config.files import MODEL_FOLDER, MODEL_HEADS, task_of
from runners.config.model import validate
from runners.config.reading import read_json
from runners.config.support import ADAPTER_CONFIG, adapter_alone, refuse_unsupported
from runners.config.torchserve import MODEL_CONFIG
from runners.contracts.errors import ConfigError, ModelNotFound
from runners.hf.weights import count_parameters, main_dtype

if TYPE_CHECKING:
    from model_store_scripts.store import StoredModel


@dataclass(frozen=True)
class ImportRequest:
    """What to import, and under which name and configuration."""

    source: str
    """A folder, or the id of a hub model."""
    name: str
    """The model's name in the store."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Fields of `setup_config.json` that take precedence over the source's."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    setup_config: Path | None = None
    """A published `setup_config.json` or `model-config.yaml` to use instead of the source's."""
    convert_checkpoints: bool = False
    """Whether pickled weights are converted; else they are refused."""
    source_name: str | None = None
    """What messages call the source; its path by default."""
    origin: str | None = None
    """What the metadata call the source; `source` by default."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Additional metadata; a difference in them makes a new version."""
    force: bool = False
    """Whether to make a new version even if the store has the same model."""
    model: NamedFolder | None = None
    """The model's folder, if it is not in the source."""
    model_config: str = MODEL_CONFIG
    """The name of TorchServe's `model-config.yaml` in the source."""
    excluded: frozenset[str] = frozenset()
    """Names at the top of the source that are no part of a model, and of which no note speaks."""


@dataclass(frozen=True)
class ImportedModel:
    """A model in the store, and what the user should know about its import."""

    tag: str
    task: str
    new: bool
    """False if the store had the same model under this name already."""
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]
    setup_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Inspection:
    """A source whose files have passed all checks."""

    source: Source
    setup_config: dict[str, Any]
    auxiliary: list[str]
    weights: layout.WeightFiles
    notes: list[str]


def import_model(request: ImportRequest) -> ImportedModel:
    """Import a model into the BentoML store, unless it has the same one under this name.

    Raises: ConfigError and its subclasses; the store is then unchanged.
    """
    check_name(request.name)
    inspection = _inspect(request)
    # bentoml takes a second to import, which a refused model does not have to wait for.
    from model_store_scripts import store

    with store.staging() as stage:
        files = _files(inspection, stage / "converted")
        metadata = _describe(request, inspection, files) | {"total_bytes": total_bytes(files)}
        candidates = [] if request.force else store.stored_models(request.name)
        stored = _find_same(candidates, request, inspection, files, metadata)
        if stored:
            store.make_latest(stored.tag)
            return _result(stored.tag, inspection, stored.metadata, new=False)
        item = stage / "item"
        metadata["fingerprint"] = copy_files(
            files, item / MODEL_FOLDER, checksums=inspection.source.checksums()
        )
        tag = store.save(
            request.name,
            item,
            setup_config=inspection.setup_config,
            labels={key: metadata[key] for key in ("task", "engine")},
            metadata=metadata,
        )
        return _result(tag, inspection, metadata, new=True)


def check_name(name: str) -> None:
    """Raises: ConfigError if a model in the store cannot have this name."""
    if len(name) > 63 or not re.fullmatch("[a-z0-9]([-._a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"{name!r} is not a model name: at most 63 characters of a-z, 0-9, '-', '_' and '.', "
            "the first and the last a letter or digit"
        )


def _inspect(request: ImportRequest) -> _Inspection:
    """Check everything that can be checked before a byte is copied or a weight downloaded."""
    path = Path(request.source).expanduser()
    folder = NamedFolder(path, request.source_name or str(path))
    setup = read_setup_files(
        folder,
        file=request.setup_config,
        engine=request.overrides.get("engine"),
        model=request.model,
        model_config=request.model_config,
    )
    source = _open(request, folder, setup)
    refuse_unsafe_names(source.names)
    heads = [name for name in MODEL_HEADS if name in source.names]
    source.fetch(heads)
    refuse_unsafe_configs(source.root, heads)
    _refuse_unsupported(source, heads, folder.name)
    parts = layout.parts_of(source.root)
    setup_names = {name for name in source.names if source.root / name in setup.files}
    auxiliary = layout.auxiliary_files(parts, source.names - setup_names)
    source.fetch([*auxiliary, *layout.indexes(parts, source.names)])
    layout.refuse_pointers(source.root, auxiliary)
    refuse_unsafe_configs(source.root, auxiliary)
    layout.refuse_incomplete(parts, source.names)
    setup_config, warnings = _setup_config(request, source, setup)
    weights = layout.choose_weights(
        source.root, parts, source.names, convert=request.convert_checkpoints
    )
    pickles = [name for part in weights.pickles for name in part.files]
    others = sorted(source.names - {*auxiliary, *weights.files, *pickles, *setup_names})
    left_out = _left_out([*_siblings(request, folder.path, source, setup), *others])
    source.fetch([*weights.files, *pickles])
    layout.refuse_pointers(source.root, [*weights.files, *pickles])
    notes = warnings + setup.notes + left_out
    return _Inspection(source, setup_config, auxiliary, weights, notes)


def _siblings(request: ImportRequest, folder: Path, source: Source, setup: SetupFiles) -> list[str]:
    """The files and folders next to the model's folder, without those that were read."""
    names = sorted(os.listdir(folder)) if request.model else source.ignored
    return [n for n in names if n not in request.excluded and folder / n not in setup.files]


def _left_out(names: list[str]) -> list[str]:
    names = [name for name in names if not name.startswith(".")]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"left out: {', '.join(names[:5])}{more}"] if names else []


def _open(request: ImportRequest, folder: NamedFolder, setup: SetupFiles) -> Source:
    if setup.root:
        if request.revision:
            raise ConfigError(f"{request.source} is a local folder and has no revisions")
        return FolderSource(request.model or folder, setup.root, request.excluded)
    if folder.path.exists() or not is_hub_id(request.source):
        raise ModelNotFound(f"{request.source} is neither a folder nor the id of a hub model")
    revision = request.revision or setup.fields.values.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise ConfigError(f"{request.setup_config}: revision must be a string")
    # The hub's client takes half a second to import; a folder does not need it.
    from model_store_scripts.hub import HubSource

    return HubSource(request.source, revision)


def _refuse_unsupported(source: Source, heads: Collection[str], name: str) -> None:
    """Refuse what could be imported but not served. Raises: ConfigError, IncompleteModel."""
    if ADAPTER_CONFIG in source.names and not heads:
        source.fetch([ADAPTER_CONFIG])
        config = read_json(source.root / ADAPTER_CONFIG, ADAPTER_CONFIG)
        raise adapter_alone(config, source=name)
    if heads != ["config.json"]:
        return
    config = read_json(source.root / "config.json", "config.json")
    refuse_unsupported(config, source=name)
    # transformers takes a second to import; a folder without a model does not have to wait for it.
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        version = importlib.metadata.version("transformers")
        raise ConfigError(
            f"{name} is a {model_type}, which transformers {version} does not know: it may be newer"
        )


def _setup_config(
    request: ImportRequest, source: Source, setup: SetupFiles
) -> tuple[dict[str, Any], list[str]]:
    """The content of the stored `setup_config.json`, and the warnings about the source's."""
    overrides = {k: v for k, v in request.overrides.items() if v is not None}
    fields = setup.fields.with_task(
        source.root, task=overrides.get("task"), name=request.source_name or request.source
    )
    values = fields.values | overrides
    if source.revision:
        values["revision"] = source.revision
    derived = {"name": request.name, "model_path": source.root}
    config = validate(values | derived, source=fields.source)
    task = task_of(source.root)
    is_conversation = (task, config.task) == ("text-generation", "conversational")
    if config.task != task and not is_conversation:
        raise ConfigError(f"the model is for {task}, not for {config.task}")
    dump = config.model_dump(mode="json", exclude_unset=True, exclude={"name", "model_path"})
    return {"engine": config.engine, "task": task} | dump, fields.warnings


def _files(inspection: _Inspection, converted: Path) -> dict[str, Path]:
    """The files to store: name to path. Pickles are converted into the folder `converted`."""
    root = inspection.source.root
    files = {name: root / name for name in [*inspection.auxiliary, *inspection.weights.files]}
    if inspection.weights.pickles:
        # torch takes seconds to import; other models do not need it.
        from model_store_scripts.convert import convert

        names = convert(inspection.weights.pickles, root, converted)
        files |= {name: converted / name for name in names}
    return files


def _describe(
    request: ImportRequest, inspection: _Inspection, files: Mapping[str, Path]
) -> dict[str, Any]:
    parameters = count_parameters(layout.read_headers(files).values())
    revision = inspection.source.revision
    return {
        "architecture": _architecture(inspection.source.root),
        "parameters": parameters.total(),
        "dtype": main_dtype(parameters),
        "task": inspection.setup_config["task"],
        "engine": inspection.setup_config["engine"],
        "source": request.origin or request.source,
        **({"revision": revision} if revision else {}),
        **request.metadata,
    }


def _architecture(root: Path) -> str:
    if task_of(root) == "text-to-image":
        return str(read_json(root / "model_index.json")["_class_name"])
    config = read_json(root / "config.json")
    return str((config.get("architectures") or ["unknown"])[0])


def _find_same(
    stored_models: Iterable[StoredModel],
    request: ImportRequest,
    inspection: _Inspection,
    files: Mapping[str, Path],
    metadata: Mapping[str, Any],
) -> StoredModel | None:
    """The latest stored model with the same configuration, metadata and files."""
    compared = {**request.metadata, "total_bytes": metadata["total_bytes"]}
    candidates = [
        stored
        for stored in stored_models
        if compared.items() <= stored.metadata.items()
        and _without_revision(stored.setup_config) == _without_revision(inspection.setup_config)
    ]
    if not candidates:
        return None
    fingerprint = copy_files(files, None, checksums=inspection.source.checksums())
    return next((s for s in reversed(candidates) if s.metadata["fingerprint"] == fingerprint), None)


def _without_revision(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration to compare: a commit that changed no file of the model makes no version."""
    return {key: value for key, value in config.items() if key != "revision"}


def _result(
    tag: str, inspection: _Inspection, metadata: Mapping[str, Any], *, new: bool
) -> ImportedModel:
    setup_config = inspection.setup_config
    notes = tuple(inspection.notes)
    return ImportedModel(tag, setup_config["task"], new, metadata, notes, setup_config)
