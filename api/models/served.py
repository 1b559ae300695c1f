"""The models a server holds: one for text, one for images, or both."""

from __future__ import annotations

from dataclasses import dataclass

from api.models.images import ImageModel
from api.models.tasks import TaskModel
from api.models.text import TextModel
from runners.contracts.errors import ModelNotServed


@dataclass(frozen=True)
class Served:
    """What there is; at least one of them, and not both of `text_model` and `task_model`."""

    text_model: TextModel | None = None
    task_model: TaskModel | None = None
    image_model: ImageModel | None = None

    @property
    def models(self) -> list[TextModel | TaskModel | ImageModel]:
        """All there are."""
        held = (self.text_model, self.task_model, self.image_model)
        return [model for model in held if model is not None]

    @property
    def text(self) -> TextModel:
        """The text model. Raises: ModelNotServed."""
        if self.text_model is None:
            raise self._missing("that generates text")
        return self.text_model

    @property
    def conversing(self) -> TextModel:
        """The text model, for a conversation. Raises: ModelNotServed."""
        if self.text_model is None:
            raise self._missing("that converses, which needs a text-generation model")
        return self.text_model

    def task(self, name: str) -> TaskModel:
        """The model for a task. Raises: ModelNotServed."""
        if self.task_model is None or self.task_model.task != name:
            raise self._missing(f"for {name}")
        return self.task_model

    @property
    def image(self) -> ImageModel:
        """The image model. Raises: ModelNotServed."""
        if self.image_model is None:
            raise self._missing("that paints images")
        return self.image_model

    def _missing(self, what: str) -> ModelNotServed:
        held = []
        if self.text_model is not None:
            held.append("one for text-generation")
        if self.task_model is not None:
            held.append(f"one for {self.task_model.task} (POST /tasks/{self.task_model.task})")
        if self.image_model is not None:
            held.append("one for text-to-image")
        return ModelNotServed(f"this server holds no model {what}, only {' and '.join(held)}")
