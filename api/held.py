"""What the models of all tasks have in common for the routes."""

from __future__ import annotations

from typing import Generic, TypeVar

from api.admission import Admission
from runners.contracts import Runner

R = TypeVar("R", bound=Runner)


class HeldModel(Generic[R]):
    """A model this server holds: its runner, and how much of it may be in work at once."""

    def __init__(self, runner: R, admission: Admission) -> None:
        self.runner = runner
        self.admission = admission

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self.runner.name
