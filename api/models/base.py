"""What the served models of all tasks have in common."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from api.http.admission import Admission
from runners.contracts.errors import ModelNotServed
from runners.contracts.runner import Runner

R = TypeVar("R", bound=Runner[Any, Any])


class ServedModel(Generic[R]):
    """A model that this server serves: its runner and its admission."""

    def __init__(self, runner: R, admission: Admission) -> None:
        self.runner = runner
        self.admission = admission

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self.runner.name

    def require(self, name: str | None) -> None:
        """Check that a request that names a model names this one. Raises: ModelNotServed."""
        if name is not None and name != self.name:
            raise ModelNotServed(f"is not served here; use {self.name}", field="model")
