"""From "which model" to a runner for it: a folder or a tag of the BentoML model store."""

from __future__ import annotations

import logging
from pathlib import Path

import bentoml
from bentoml.exceptions import BentoMLException

from runners import create_runner
from runners.config import BaseRunnerConfig, load_setup_config
from runners.contracts import TextRunner
from runners.errors import ConfigError, ModelNotFound
from settings import PREFIX, Settings

logger = logging.getLogger("triptych")


def is_folder(choice: str) -> bool:
    """Whether a choice names a folder; else it is a store tag."""
    return Path(choice).expanduser().is_dir()


def text_config(choice: str, settings: Settings) -> BaseRunnerConfig:
    """How to run the chosen text model. Raises: ConfigError, one sentence for the operator."""
    if not choice:
        raise ConfigError(
            f"no model is chosen: set {PREFIX}TEXT_MODEL to a folder or a tag of the model store; "
            + _text_models_in_store()
        )
    name, folder = _locate(choice)
    overrides = {
        "engine": settings.text_engine,
        "tensor_parallel": settings.tensor_parallel,
        "max_batch_size": settings.max_batch_size,
        "max_kv_tokens": settings.max_kv_tokens,
        "start_timeout": settings.start_timeout,
        "num_threads": settings.num_threads,
    }
    config, warnings = load_setup_config(folder, name=name, overrides=overrides)
    for warning in warnings:
        logger.warning("%s", warning)
    return config


def text_runner(choice: str, settings: Settings) -> TextRunner:
    """A runner for the chosen text model, not yet started. Raises: ConfigError."""
    return create_runner(text_config(choice, settings))


def _locate(choice: str) -> tuple[str, Path]:
    """Name and folder of a model. Raises: ModelNotFound."""
    if is_folder(choice):
        folder = Path(choice).expanduser().resolve()
        return folder.name, folder
    try:
        model = bentoml.models.get(choice)
    except (BentoMLException, ValueError):  # not in the store, or not even a tag
        raise ModelNotFound(
            f"{choice} is neither a folder nor a tag of the model store; " + _text_models_in_store()
        ) from None
    return model.tag.name, Path(model.path)


def _text_models_in_store() -> str:
    tags = sorted(str(m.tag) for m in bentoml.models.list() if _is_text_model(Path(m.path)))
    if not tags:
        return "the store holds no text models"
    return f"text models in the store: {', '.join(tags)}"


def _is_text_model(folder: Path) -> bool:
    return any((base / "config.json").is_file() for base in (folder, folder / "model"))
