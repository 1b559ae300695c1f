"""Loads a diffusers pipeline from its folder, without running any code from the folder.

Called by `runners.engines.images`, in rank processes.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from runners.config.base import BaseRunnerConfig, ImageConfig
from runners.config.reading import read_json
from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel
from runners.hf.dtypes import cast_to_float32, dtype_in, log_dtypes
from runners.hf.models import loading
from runners.hf.safety import refuse_code, refuse_foreign_components
from runners.images.weights import Weights
from runners.protocol.process import give_back_memory

logger = logging.getLogger("triptych.images")

INDEX = "model_index.json"
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
MODEL_CLASSES = (diffusers.ModelMixin, transformers.PreTrainedModel)
REQUIRED_PARAMETERS = frozenset({"prompt", "height", "width", "num_inference_steps", "generator"})
"""Parameters without which a pipeline cannot be served."""


def load_pipeline(
    config: ImageConfig, *, on_cpu: bool, options: Mapping[str, Any] | None = None
) -> Any:
    """The pipeline, on the CPU unless `options` (of `from_pretrained`) place it elsewhere.

    Raises: UnsafeModel, IncompleteModel, ConfigError if it cannot be served.
    """
    _silence_libraries()
    folder = config.model_path
    index = read_json(folder / INDEX)
    cls = _pipeline_class(index, config)
    _refuse_code(folder, index)
    weights = Weights(folder, _model_classes(folder, index))
    dtype = _dtype(config, weights)
    float32_vae = not on_cpu and _needs_float32_vae(cls, folder, dtype)
    dtypes = {"default": dtype} | ({"vae": torch.float32} if float32_vae else {})
    arguments = dict(options or {})
    with loading(config.name):
        if "device_map" in arguments:
            weights.check()
        else:
            arguments |= weights.load(dtypes)
        pipeline = cls.from_pretrained(
            folder,
            dtype=dtypes,
            variant=weights.variant,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **arguments,
        )
    pipeline.set_progress_bar_config(disable=True)
    if on_cpu:
        models = models_of(pipeline).values()
        for model in models:
            cast_to_float32(model)
        give_back_memory()
        log_dtypes(config.name, *models)
    if float32_vae:
        pipeline.vae.decode = _with_float32_latents(pipeline.vae.decode)
    return pipeline


def denoiser_of(pipeline: Any) -> Any:
    """The model that every denoising step calls. Raises: ConfigError if there is none."""
    for name in ("unet", "transformer"):
        if (model := getattr(pipeline, name, None)) is not None:
            return model
    raise ConfigError(f"{type(pipeline).__name__} has neither a U-Net nor a transformer")


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's models by component name."""
    return {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}


def parameters_of(cls: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the `__call__` of a pipeline class, by name."""
    return inspect.signature(cls.__call__).parameters


def _silence_libraries() -> None:
    """Turn off the progress bars of diffusers and the log of both libraries below errors."""
    # CLIP's tokenization would log the part of a prompt that it truncates.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_default_handler()
    diffusers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _pipeline_class(index: Mapping[str, Any], config: BaseRunnerConfig) -> Any:
    """Raises: UnsafeModel, ConfigError."""
    # Not at the top: the import warns of missing optional packages unless the log is silenced.
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    name = index.get("_class_name")
    if not isinstance(name, str):
        raise UnsafeModel(f"{INDEX} names a custom pipeline class, which would be code")
    cls = getattr(diffusers, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ConfigError(
            f"{config.name} is a {name}, which diffusers {diffusers.__version__} lacks"
        )
    text_to_image = {known.__name__ for known in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    if (
        name not in text_to_image
        or "ControlNet" in name
        or not parameters_of(cls).keys() >= REQUIRED_PARAMETERS
    ):
        raise ConfigError(
            f"{config.name} is a {name}, which does not generate images from a prompt alone in "
            "denoising steps"
        )
    return cls


def _refuse_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Raises: UnsafeModel that names what would be run."""
    refuse_code(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    refuse_foreign_components(index, INDEX)


def _model_classes(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of the pipeline's models by component name. Raises: IncompleteModel."""
    from diffusers.pipelines import stable_diffusion  # not at the top, as in `_pipeline_class`

    libraries = LIBRARIES | {"stable_diffusion": stable_diffusion}
    classes: dict[str, Any] = {}
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and value[0] in libraries):
            continue
        cls = getattr(libraries[value[0]], str(value[1]), None)
        if not (inspect.isclass(cls) and issubclass(cls, MODEL_CLASSES)):
            continue
        if not (folder / name).is_dir():
            raise IncompleteModel(f"{name} is missing, which {INDEX} names")
        classes[name] = cls
    return classes


def _dtype(config: BaseRunnerConfig, weights: Weights) -> torch.dtype:
    """The type of the weights. Raises: IncompleteModel."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    # The denoiser's files come first: some pipelines store other models in a wider type.
    names = ("unet", "transformer", *weights.classes)
    files = [path for name in names for path in weights.files(name)]
    if not files:
        raise IncompleteModel(f"{config.name} has no safetensors in the folders of its components")
    return dtype_in(files[0]) or torch.float32


def _needs_float32_vae(cls: Any, folder: Path, dtype: torch.dtype) -> bool:
    """Whether a float16 pipeline decodes in float32.

    Such a pipeline casts its VAE to float32, decodes, and casts it back, while other images use the
    same VAE. It does nothing to a VAE that is loaded in float32.
    """
    if dtype != torch.float16 or not hasattr(cls, "upcast_vae"):
        return False
    return bool(read_json(folder / "vae" / "config.json").get("force_upcast", True))


def _with_float32_latents(decode: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(decode)
    def decode_float32(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.float(), *args, **kwargs)

    return decode_float32
