"""From "which model" to a runner for it: a folder or a tag of the BentoML model store."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bentoml
from bentoml.exceptions import BentoMLException

from runners import TEXT_TASKS, create_runner, create_task_runner
from runners.config import BaseRunnerConfig
from runners.config_files import load_setup_config
from runners.contracts import TaskRunner, TextRunner
from runners.errors import ConfigError, ModelNotFound
from settings import PREFIX, Settings, variable

logger = logging.getLogger("triptych")

OVERRIDES = {
    "engine": "text_engine",
    "tensor_parallel": "tensor_parallel",
    "nnodes": "nnodes",
    "node_rank": "node_rank",
    "rdzv_endpoint": "rdzv_endpoint",
    "max_batch_size": "max_batch_size",
    "max_kv_tokens": "max_kv_tokens",
    "start_timeout": "start_timeout",
    "cpu_kernels": "cpu_kernels",
    "num_threads": "num_threads",
}
"""Field of the runner's config to the setting that overrides it."""


def is_folder(choice: str) -> bool:
    """Whether a choice names a folder; else it is a store tag."""
    # os.path's, unlike pathlib's, take a user or a name that can not exist for an ordinary no.
    return os.path.isdir(os.path.expanduser(choice))


def text_config(choice: str, settings: Settings) -> BaseRunnerConfig:
    """How to run the chosen text model. Raises: ConfigError, one sentence for the operator."""
    if not choice:
        raise ConfigError(
            f"no model is chosen: set {PREFIX}TEXT_MODEL to a folder or a tag of the model store; "
            + _text_models_in_store()
        )
    name, folder = _locate(choice)
    overrides = {field: getattr(settings, setting) for field, setting in OVERRIDES.items()}
    try:
        config, warnings = load_setup_config(folder, name=name, overrides=overrides)
    except ConfigError as error:
        raise _blamed(error, folder, overrides) from None
    for warning in warnings:
        logger.warning("%s", warning)
    return config


@dataclass(frozen=True)
class Runners:
    """What was chosen, not yet started; one of the two."""

    text: TextRunner | None = None
    task: TaskRunner | None = None


def chosen_runners(choice: str, settings: Settings) -> Runners:
    """The runner for the chosen text model, by what it does. Raises: ConfigError."""
    config = text_config(choice, settings)
    if config.task in (*TEXT_TASKS, "text-to-image"):
        return Runners(text=create_runner(config))
    return Runners(task=create_task_runner(config))


def _locate(choice: str) -> tuple[str, Path]:
    """Name and folder of a model. Raises: ModelNotFound."""
    if is_folder(choice):
        folder = Path(os.path.expanduser(choice)).resolve()
        return folder.name, folder
    try:
        model = bentoml.models.get(choice)
    except (BentoMLException, ValueError):  # not in the store, or not even a tag
        raise ModelNotFound(
            f"{choice} is neither a folder nor a tag of the model store; " + _text_models_in_store()
        ) from None
    return model.tag.name, Path(model.path)


def _blamed(error: ConfigError, folder: Path, overrides: Mapping[str, object]) -> ConfigError:
    """The error in terms of the variable without which it would not be; else as it is."""
    # The engine last: what it allows is said of the others.
    for field in reversed([field for field, value in overrides.items() if value is not None]):
        try:
            config, _ = load_setup_config(folder, name="", overrides={**overrides, field: None})
        except ConfigError:
            continue
        setting = f"{variable(OVERRIDES[field])}={overrides[field]}"
        problem = error.message.partition(": ")[2] or error.message
        meaning = type(config).model_fields[field].description if field != "engine" else None
        return ConfigError(f"{setting} does not fit this model: {meaning or problem}")
    return error


def _text_models_in_store() -> str:
    tags = sorted(str(m.tag) for m in bentoml.models.list() if _is_text_model(Path(m.path)))
    if not tags:
        return "the store holds no text models"
    return f"text models in the store: {', '.join(tags)}"


def _is_text_model(folder: Path) -> bool:
    return any((base / "config.json").is_file() for base in (folder, folder / "model"))
