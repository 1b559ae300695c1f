"""What a model folder must not bring along: code, or the name of code to import.

Called by the import commands and, before a pipeline is loaded, by the ranks. Never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from runners.contracts.errors import UnsafeModel

CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib"})
LIBRARIES = frozenset({"diffusers", "transformers", "stable_diffusion"})
"""Where the components of a pipeline may come from. diffusers would import any module named."""

_CLASS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def is_code(name: str) -> bool:
    """Whether a file's name is that of code."""
    return PurePosixPath(name).suffix.lower() in CODE_SUFFIXES


def is_class_name(value: object) -> bool:
    """Whether a value is the plain name of a class, without a module."""
    return isinstance(value, str) and _CLASS_NAME.fullmatch(value) is not None


def refuse_code(names: Iterable[str]) -> None:
    """Raises: UnsafeModel that names the first file that is code."""
    for name in sorted(names):
        if is_code(name):
            raise UnsafeModel(f"{name} is code: Triptych serves only models that need no code")


def refuse_foreign_components(index: Mapping[str, Any], name: str) -> None:
    """Raises: UnsafeModel if a component in `model_index.json` comes from another library.

    `name` is what the error calls the file.
    """
    for component, value in index.items():
        if isinstance(value, list) and value != [None, None]:
            library, class_name = value if len(value) == 2 else (None, None)
            is_known = isinstance(library, str) and library in LIBRARIES
            if not is_known or not is_class_name(class_name):
                raise UnsafeModel(
                    f"{name} takes {component} from {value!r}, which is neither diffusers nor "
                    "transformers"
                )
