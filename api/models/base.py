"""What the served models of all tasks have in common."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

from api.http.admission import Admission
from runners.contracts.errors import ModelNotServed
from runners.contracts.runner import Runner

R = TypeVar("R", bound=Runner[Any, Any])


class ServedModel(Generic[R]):
    """A model that this server serves: its runner and its admission.

    `aliases` are further names for it, or patterns of names (`fnmatch`).
    """

    def __init__(self, runner: R, admission: Admission, *, aliases: Iterable[str] = ()) -> None:
        self.runner = runner
        self.admission = admission
        self._aliases = tuple(aliases)

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self.runner.name

    def has_name(self, name: str) -> bool:
        """Whether clients may call the model by `name`."""
        return name == self.name or any(fnmatchcase(name, alias) for alias in self._aliases)

    def require(self, name: str | None) -> None:
        """Check that a request that names a model names this one. Raises: ModelNotServed."""
        if name is not None and not self.has_name(name):
            raise ModelNotServed(f"is not served here; use {self.name}", field="model")
