"""What a model may not bring along: code, or a way to have code fetched or run."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from runners.config.reading import read_json
from runners.contracts.errors import UnsafeModel

CODE = frozenset({".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib"})
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_pipeline")
# Where a pipeline's component may come from. diffusers would import any module named here.
LIBRARIES = frozenset({"diffusers", "transformers", "stable_diffusion"})

MAX_NAME = 1024
"""Bytes of a name with its folders, of which there are few."""
MAX_PARTS = 32

_CLASS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def refuse_unsafe_names(names: Collection[str]) -> None:
    """No code, and no name that a file system or a terminal could trip over.

    Raises: UnsafeModel that names the file.
    """
    for name in sorted(names):
        refuse_unsafe_path(name)
        if is_code(name):
            raise UnsafeModel(f"{name} is code: Triptych serves models that need none of their own")


def is_code(name: str) -> bool:
    """Whether a file is called as code is."""
    return PurePosixPath(name).suffix.lower() in CODE


def refuse_unsafe_path(name: str, *, of: str = "") -> None:
    """No name that leads elsewhere or that a file system or a terminal could trip over.

    `of`: what it is a name in. Raises: UnsafeModel that names both.
    """
    path = PurePosixPath(name)
    if (
        not name.isprintable()
        or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME
        or len(path.parts) > MAX_PARTS
        or "\\" in name
        or path.is_absolute()
        or ".." in path.parts
        or any(len(part.encode("utf-8", "surrogateescape")) > 200 for part in path.parts)
    ):
        where, called = of and f"{of}: ", name if len(name) <= 200 else f"{name[:50]}..."
        raise UnsafeModel(f"{where}{called!r} is not a file name a model can have")


def refuse_unsafe_configs(root: Path, names: Iterable[str]) -> None:
    """No JSON configuration that points at code. Raises: UnsafeModel that names file and key."""
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
    """No key, at any depth, that makes a library load code from the model. Raises: UnsafeModel."""
    for key, value in _items(content):
        if key in CODE_KEYS and value:
            raise UnsafeModel(f"{name} has {key}, which would load code from the model")
        if key == "trust_remote_code" and value:
            raise UnsafeModel(f"{name} asks for trust_remote_code, which Triptych never grants")


def _items(content: object) -> Iterator[tuple[str, Any]]:
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _is_class_name(value: object) -> bool:
    return isinstance(value, str) and _CLASS_NAME.fullmatch(value) is not None


def _refuse_odd_architectures(content: Mapping[str, Any], name: str) -> None:
    given = content.get("architectures")
    if given is not None and not (isinstance(given, list) and all(map(_is_class_name, given))):
        raise UnsafeModel(f"{name} has architectures that are no list of class names")


def _refuse_custom_pipeline(content: Mapping[str, Any], name: str) -> None:
    pipeline = content.get("_class_name")
    if not _is_class_name(pipeline):
        raise UnsafeModel(f"{name} names a custom pipeline class ({pipeline!r})")
    for component, value in content.items():
        if isinstance(value, list) and value != [None, None]:
            library, class_name = value if len(value) == 2 else (None, None)
            if library not in LIBRARIES or not _is_class_name(class_name):
                raise UnsafeModel(
                    f"{name} takes {component} from {value!r}, which is neither diffusers nor "
                    "transformers"
                )
