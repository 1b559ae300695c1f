"""What an import refuses: names that lead elsewhere, and configurations that load code.

The rules about code itself, which the ranks apply too, are in `runners.hf.safety`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from runners.config.reading import read_json
from runners.contracts.errors import UnsafeModel
from runners.hf.safety import is_class_name, refuse_code, refuse_foreign_components

CODE_KEYS = ("auto_map", "custom_pipelines", "custom_pipeline")

MAX_NAME_BYTES = 1024
"""Of a file's name with its folders."""
MAX_PART_BYTES = 200
"""Of a file or folder in such a name."""
MAX_PARTS = 32


def refuse_unsafe_names(names: Collection[str]) -> None:
    """Raises: UnsafeModel that names a file which is code or has an unsafe name."""
    for name in sorted(names):
        refuse_unsafe_path(name)
    refuse_code(names)


def refuse_unsafe_path(name: str, *, container: str = "") -> None:
    """Refuse a name that leads elsewhere or that a file system or a terminal may mishandle.

    `container` is the archive that has the name, for the error. Raises: UnsafeModel.
    """
    path = PurePosixPath(name)
    if (
        not name.isprintable()
        or _byte_count(name) > MAX_NAME_BYTES
        or len(path.parts) > MAX_PARTS
        or "\\" in name
        or path.is_absolute()
        or ".." in path.parts
        or any(_byte_count(part) > MAX_PART_BYTES for part in path.parts)
    ):
        prefix = f"{container}: " if container else ""
        shortened = name if len(name) <= MAX_PART_BYTES else f"{name[:50]}..."
        raise UnsafeModel(f"{prefix}{shortened!r} is not a file name a model can have")


def refuse_unsafe_configs(root: Path, names: Iterable[str]) -> None:
    """Refuse JSON configurations that point at code. Raises: UnsafeModel (names file and key)."""
    for name in sorted(names):
        if name.endswith(("config.json", "model_index.json")):
            content = read_json(root / name)
            refuse_code_keys(content, name)
            match PurePosixPath(name).name:
                case "config.json":
                    _refuse_odd_architectures(content, name)
                case "model_index.json":
                    _refuse_custom_pipeline(content, name)


def refuse_code_keys(content: Mapping[str, Any], name: str) -> None:
    """Raises: UnsafeModel if a key, at any depth, makes a library load code from the model."""
    for key, value in _items(content):
        if key in CODE_KEYS and value:
            raise UnsafeModel(f"{name} has {key}, which would load code from the model")
        if key == "trust_remote_code" and value:
            raise UnsafeModel(f"{name} asks for trust_remote_code, which Triptych never grants")


def _items(content: object) -> Iterator[tuple[str, Any]]:
    """The keys and values of all objects in JSON content, however deep."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _byte_count(name: str) -> int:
    return len(name.encode("utf-8", "surrogateescape"))


def _refuse_odd_architectures(content: Mapping[str, Any], name: str) -> None:
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(map(is_class_name, names))):
        raise UnsafeModel(f"{name} has architectures that are not a list of class names")


def _refuse_custom_pipeline(content: Mapping[str, Any], name: str) -> None:
    pipeline = content.get("_class_name")
    if not is_class_name(pipeline):
        raise UnsafeModel(f"{name} names a custom pipeline class ({pipeline!r})")
    refuse_foreign_components(content, name)
