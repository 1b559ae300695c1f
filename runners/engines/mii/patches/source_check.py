"""A check that what a patch replaces has the source that the patch was written for.

With another version of MII the start stops with an error, instead of patching code that the patch
does not know.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from runners.contracts.errors import EngineUnavailable

MII_VERSION = "0.3.3"


def source_digest(original: Callable[..., Any] | type) -> str:
    """A digest of the source of a function or class."""
    return hashlib.sha256(inspect.getsource(original).encode()).hexdigest()[:12]


def check_source(original: Callable[..., Any] | type, expected: str) -> None:
    """Raises: EngineUnavailable unless the digest of the source of `original` is `expected`."""
    if source_digest(original) != expected:
        raise EngineUnavailable(
            f"the MII engine needs DeepSpeed-MII {MII_VERSION}; {original.__module__}."
            f"{original.__qualname__} differs in the installed {version('deepspeed-mii')}"
        )
