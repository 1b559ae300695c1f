"""From the choice of a model, a folder or a tag of the BentoML model store, to its runner.

`service.py`, `cli` and `deploy` call it.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
from bentoml.exceptions import BentoMLException

from runners import create_runner
from runners.config.base import BaseRunnerConfig, GpuShare, ImageConfig, TaskConfig, TextConfig
from runners.config.files import load_setup_config
from runners.contracts.errors import ConfigError, ModelNotFound
from runners.contracts.images import ImageRunner
from runners.contracts.tasks import TaskRunner
from runners.contracts.text import TextRunner
from settings import PREFIX, Settings, variable

if TYPE_CHECKING:
    from bentoml import Bento

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
"""Field of a text model's config to the setting that overrides it."""

IMAGE_OVERRIDES = {
    "engine": "image_engine",
    "start_timeout": "start_timeout",
    "num_threads": "num_threads",
}
"""The same for an image model; the other settings are for text models."""


def is_folder(choice: str) -> bool:
    """Whether a choice names a folder; otherwise it is a store tag."""
    # pathlib raises an error for a user or a name that cannot exist; os.path returns False.
    return os.path.isdir(os.path.expanduser(choice))


@dataclass(frozen=True)
class Runners:
    """Runners of the chosen models, not started yet; not both of `text` and `task`."""

    text: TextRunner | None = None
    task: TaskRunner | None = None
    image: ImageRunner | None = None


def chosen_runners(text: str, image: str, settings: Settings) -> Runners:
    """Runners of a text and an image model, each empty for none. Raises: ConfigError."""
    if not (text or image):
        raise ConfigError(
            f"no model is chosen: set {PREFIX}TEXT_MODEL or {PREFIX}IMAGE_MODEL to a folder or a "
            f"tag of the model store; {_models_in_store()}"
        )
    runners = Runners()
    for config in _with_gpu_shares(chosen_configs(text, image, settings)).values():
        match config:
            case ImageConfig():
                runners = replace(runners, image=create_runner(config))
            case TextConfig():
                runners = replace(runners, text=create_runner(config))
            case TaskConfig():
                runners = replace(runners, task=create_runner(config))
    return runners


def chosen_configs(
    text: str, image: str, settings: Settings, *, overriding: bool = True
) -> dict[str, BaseRunnerConfig]:
    """The configs of a text and an image model, by `text` and `image`; an empty choice has none.

    `overriding`: whether settings take precedence over the models' own configs. Raises:
    ConfigError.
    """
    configs = {}
    if text:
        overridable = OVERRIDES if overriding else {}
        configs["text"] = config = model_config(text, settings, overridable)
        if isinstance(config, ImageConfig):
            raise _misplaced("TEXT_MODEL", text, config, "IMAGE_MODEL")
    if image:
        overridable = IMAGE_OVERRIDES if overriding else {}
        configs["image"] = config = model_config(image, settings, overridable)
        if not isinstance(config, ImageConfig):
            raise _misplaced("IMAGE_MODEL", image, config, "TEXT_MODEL")
    return configs


def frozen_tag(bento: Bento, built: str) -> str:
    """The tag, with version, of the model that a bento was built with; empty if it has none."""
    if is_folder(built):
        return ""
    name = built.partition(":")[0]
    tags = (str(model.tag) for model in bento.info.all_models if model.tag.name == name)
    return next(tags, "")


def _with_gpu_shares(configs: Mapping[str, BaseRunnerConfig]) -> dict[str, BaseRunnerConfig]:
    """The configs; of several models, each with its share of the GPUs that all of them request."""
    counts = [config.requested_gpus for config in configs.values()]
    if len(counts) < 2:
        return dict(configs)
    firsts = itertools.accumulate(counts, initial=0)
    return {
        model: config.model_copy(update={"gpu_share": GpuShare(first, count, sum(counts))})
        for (model, config), first, count in zip(configs.items(), firsts, counts, strict=False)
    }


def _misplaced(name: str, choice: str, config: BaseRunnerConfig, right_name: str) -> ConfigError:
    return ConfigError(
        f"{PREFIX}{name}={choice} is a model for {config.task}: choose it with {PREFIX}{right_name}"
    )


def model_config(
    choice: str, settings: Settings, overridable: Mapping[str, str] = OVERRIDES
) -> BaseRunnerConfig:
    """The config of the chosen model.

    `overridable`: field of the config to the setting that overrides it. Raises: ConfigError.
    """
    name, folder = _locate(choice)
    values = settings.model_dump()
    overrides = {field: values[setting] for field, setting in overridable.items()}
    try:
        config, warnings = load_setup_config(folder, name=name, overrides=overrides)
    except ConfigError as error:
        raise _in_terms_of_setting(error, folder, overrides, overridable) from None
    for warning in warnings:
        logger.warning("%s", warning)
    return config


def _locate(choice: str) -> tuple[str, Path]:
    """Name and folder of a model. Raises: ModelNotFound."""
    if is_folder(choice):
        folder = Path(os.path.expanduser(choice)).resolve()
        return folder.name, folder
    try:
        model = bentoml.models.get(choice)
    except (BentoMLException, ValueError):  # not in the store, or not even a tag
        raise ModelNotFound(
            f"{choice} is neither a folder nor a tag of the model store; " + _models_in_store()
        ) from None
    return model.tag.name, Path(model.path)


def _in_terms_of_setting(
    error: ConfigError,
    folder: Path,
    overrides: Mapping[str, object],
    overridable: Mapping[str, str],
) -> ConfigError:
    """The error of the variable without which the config is valid; `error` if there is none.

    The field that `error` names is not enough: an engine chosen by variable makes a field of the
    file invalid. So the config is loaded once without each override.
    """
    # The engine last: another setting may be invalid with this engine only.
    for field in reversed([field for field, value in overrides.items() if value is not None]):
        try:
            config, _ = load_setup_config(folder, name="", overrides={**overrides, field: None})
        except ConfigError:
            continue
        setting = f"{variable(overridable[field])}={overrides[field]}"
        fields = type(config).model_fields
        description = fields[field].description if field in fields and field != "engine" else None
        return ConfigError(f"{setting} does not fit this model: {description or error.reason}")
    return error


def _models_in_store() -> str:
    """The tags of all models in the store, in words."""
    parts = []
    for task, head in (("text", "config.json"), ("image", "model_index.json")):
        tags = sorted(
            str(model.tag) for model in bentoml.models.list() if _has(Path(model.path), head)
        )
        parts.append(f"{task} models in the store: {', '.join(tags) or 'none'}")
    return "; ".join(parts)


def _has(folder: Path, head: str) -> bool:
    return any((base / head).is_file() for base in (folder, folder / "model"))
