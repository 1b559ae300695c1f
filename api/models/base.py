"""What the models of all tasks have in common for the routes."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from api.http.admission import Admission
from runners.contracts.errors import ModelNotServed
from runners.contracts.runner import Runner

R = TypeVar("R", bound=Runner[Any, Any])


class HeldModel(Generic[R]):
    """A model this server holds: its runner, and how much of it may be in work at once."""

    def __init__(self, runner: R, admission: Admission) -> None:
        self.runner = runner
        self.admission = admission

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self.runner.name

    def require(self, name: str | None) -> None:
        """Check that this is the model a request names. Raises: ModelNotServed."""
        if name is not None and name != self.name:
            raise ModelNotServed(f"is not served here; use {self.name}", field="model")
