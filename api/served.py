"""The model a server holds: a text model, or one for a task."""

from __future__ import annotations

from dataclasses import dataclass

from api.generation import TextModel
from api.tasks.model import TaskModel
from runners.errors import ModelNotServed


@dataclass(frozen=True)
class Served:
    """What there is; at least one of the two."""

    text_model: TextModel | None = None
    task_model: TaskModel | None = None

    @property
    def text(self) -> TextModel:
        """The text model. Raises: ModelNotServed."""
        if self.text_model is None:
            raise ModelNotServed(f"this server holds no model that generates text, {self._only()}")
        return self.text_model

    @property
    def conversing(self) -> TextModel:
        """The text model, for a conversation. Raises: ModelNotServed."""
        if self.text_model is None:
            raise ModelNotServed(
                "conversational needs a text-generation model with a chat template; this server "
                f"holds none, {self._only()}"
            )
        return self.text_model

    def task(self, name: str) -> TaskModel:
        """The model for a task. Raises: ModelNotServed."""
        if self.task_model is None or self.task_model.task != name:
            raise ModelNotServed(f"this server holds no model for {name}, {self._only()}")
        return self.task_model

    def _only(self) -> str:
        if self.task_model is None:
            return "only one for text-generation"
        return f"only one for {self.task_model.task}: POST /tasks/{self.task_model.task}"
