"""The models that a server serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from api.models.images import ImageModel
from api.models.tasks import TaskModel
from api.models.text import TextModel
from runners.contracts.errors import ModelNotServed, RunnerUnavailable
from runners.contracts.runner import RunnerHealth


@dataclass(frozen=True)
class ServedModels:
    """At least one model, and not both of `text_model` and `task_model`."""

    text_model: TextModel | None = None
    task_model: TaskModel | None = None
    image_model: ImageModel | None = None

    @property
    def models(self) -> list[TextModel | TaskModel | ImageModel]:
        """All models."""
        models = (self.text_model, self.task_model, self.image_model)
        return [model for model in models if model is not None]

    def refuse_if(self, is_bad: Callable[[RunnerHealth], bool]) -> None:
        """Raises: RunnerUnavailable with the state of each model whose health is bad, if any is."""
        texts = []
        for model in self.models:
            health = model.runner.health()
            if is_bad(health):
                name = f"{model.name}: " if len(self.models) > 1 else ""
                texts.append(f"{name}{health.state}: {health.detail}")
        if texts:
            raise RunnerUnavailable("; ".join(texts))

    @property
    def text(self) -> TextModel:
        """The text model. Raises: ModelNotServed."""
        if self.text_model is None:
            raise self._missing("text-generation")
        return self.text_model

    @property
    def chat(self) -> TextModel:
        """The text model, for a conversation. Raises: ModelNotServed."""
        if self.text_model is None:
            raise self._missing("conversational, which needs a text-generation model")
        return self.text_model

    def task(self, name: str) -> TaskModel:
        """The model for a pipeline task. Raises: ModelNotServed."""
        if self.task_model is None or self.task_model.task != name:
            raise self._missing(name)
        return self.task_model

    @property
    def image(self) -> ImageModel:
        """The image model. Raises: ModelNotServed."""
        if self.image_model is None:
            raise self._missing("text-to-image")
        return self.image_model

    def _missing(self, task: str) -> ModelNotServed:
        served = []
        if self.text_model is not None:
            served.append("text-generation")
        if self.task_model is not None:
            served.append(f"{self.task_model.task} (POST /tasks/{self.task_model.task})")
        if self.image_model is not None:
            served.append("text-to-image")
        return ModelNotServed(
            f"this server has no model for {task}, only one for {' and one for '.join(served)}"
        )
