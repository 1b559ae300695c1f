"""Patches of MII that are made only where they fit.

A patch is written against one text of what it replaces. Whatever is patched is therefore held
against the text it had, and another version of MII stops with a sentence instead of doing something
nobody has tried.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from runners.contracts.errors import EngineUnavailable

MII_VERSION = "0.3.3"


def fingerprint(patched: Callable[..., Any] | type) -> str:
    """Stands for the source of a function or class."""
    return hashlib.sha256(inspect.getsource(patched).encode()).hexdigest()[:12]


def check(patched: Callable[..., Any] | type, expected: str) -> None:
    """Raises: EngineUnavailable unless `patched` is what it was when its patch was written."""
    if fingerprint(patched) != expected:
        raise EngineUnavailable(
            f"the MII engine knows DeepSpeed-MII {MII_VERSION}; in the installed "
            f"{version('deepspeed-mii')}, {patched.__module__}.{patched.__qualname__} is another"
        )


class Overlay:
    """A module with some of its names replaced, for one module that imported it."""

    def __init__(self, module: object, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
