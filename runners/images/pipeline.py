"""Loads a diffusers pipeline from its folder, without running code of the folder's."""

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
from runners.hf.dtypes import choose_dtype, dtype_in
from runners.hf.models import loading
from runners.hf.safety import refuse_code, refuse_foreign_components
from runners.images.weights import Weights

logger = logging.getLogger("triptych.imaging")

# What CLIP could not take in of a prompt would be logged, and nobody watches a bar in a log.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

INDEX = "model_index.json"
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
MODELS = (diffusers.ModelMixin, transformers.PreTrainedModel)
NEEDED = frozenset({"prompt", "height", "width", "num_inference_steps", "generator"})
"""Parameters without which a pipeline can not be served."""


def load_pipeline(
    config: ImageConfig, *, on_cpu: bool, options: Mapping[str, Any] | None = None
) -> Any:
    """The pipeline, still on the CPU unless `options` (of `from_pretrained`) place it.

    Raises: UnsafeModel, IncompleteModel, ConfigError if it can not be served.
    """
    folder = config.model_path
    index = read_json(folder / INDEX)
    kind = _pipeline_class(index, config)
    _refuse_code(folder, index)
    weights = Weights(folder, _model_classes(folder, index))
    dtype = _dtype(config, weights, on_cpu=on_cpu)
    wide = _wants_wide_vae(kind, folder, dtype)
    dtypes = {"default": dtype} | ({"vae": torch.float32} if wide else {})
    given = dict(options or {})
    with loading(config.name):
        if "device_map" in given:
            weights.check()
        else:
            given |= weights.load(dtypes)
        pipeline = kind.from_pretrained(
            folder,
            dtype=dtypes,
            variant=weights.variant,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **given,
        )
    pipeline.set_progress_bar_config(disable=True)
    if wide:
        pipeline.vae.decode = _widening(pipeline.vae.decode)
    return pipeline


def denoiser_of(pipeline: Any) -> Any:
    """The model that every step calls. Raises: ConfigError if there is none."""
    for name in ("unet", "transformer"):
        if (model := getattr(pipeline, name, None)) is not None:
            return model
    raise ConfigError(f"{type(pipeline).__name__} has neither a U-Net nor a transformer")


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's models by the names of its components."""
    return {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}


def parameters_of(kind: Any) -> Mapping[str, inspect.Parameter]:
    """What calling a pipeline of this class takes."""
    return inspect.signature(kind.__call__).parameters


def _pipeline_class(index: Mapping[str, Any], config: BaseRunnerConfig) -> Any:
    """Raises: UnsafeModel, ConfigError."""
    # Not at the top: its own import would warn of packages that nothing here needs.
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    name = index.get("_class_name")
    if not isinstance(name, str):
        raise UnsafeModel(f"{INDEX} names a pipeline class of its own, which would be code")
    kind = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ConfigError(
            f"{config.name} is a {name}, which diffusers {diffusers.__version__} lacks"
        )
    known = {known.__name__ for known in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    if name not in known or "ControlNet" in name or not parameters_of(kind).keys() >= NEEDED:
        raise ConfigError(
            f"{config.name} is a {name}, which does not paint from a prompt alone, step by step"
        )
    return kind


def _refuse_code(folder: Path, index: Mapping[str, Any]) -> None:
    """Raises: UnsafeModel that names what would be run."""
    refuse_code(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    refuse_foreign_components(index, INDEX)


def _model_classes(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of the pipeline's models by the names of its components.

    Raises: IncompleteModel.
    """
    from diffusers.pipelines import stable_diffusion  # as in `_pipeline_class`

    libraries = LIBRARIES | {"stable_diffusion": stable_diffusion}
    found: dict[str, Any] = {}
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and value[0] in libraries):
            continue
        kind = getattr(libraries[value[0]], str(value[1]), None)
        if not (inspect.isclass(kind) and issubclass(kind, MODELS)):
            continue
        if not (folder / name).is_dir():
            raise IncompleteModel(f"{name} is missing, which {INDEX} names")
        found[name] = kind
    return found


def _dtype(config: BaseRunnerConfig, weights: Weights, *, on_cpu: bool) -> torch.dtype:
    # The denoiser's: some pipelines keep another part in a wider type.
    files = [p for part in ("unet", "transformer", *weights.kinds) for p in weights.files(part)]
    if not files:
        raise IncompleteModel(f"{config.name} has no safetensors in the folders of its components")
    stored = dtype_in(files[0]) or torch.float32
    chosen = choose_dtype(config.dtype, stored, on_cpu=on_cpu)
    return stored if isinstance(chosen, str) else chosen


def _wants_wide_vae(kind: Any, folder: Path, dtype: torch.dtype) -> bool:
    """Whether a pipeline would decode in float32 what it computed in float16.

    It would widen its VAE, decode, and narrow it again, all while others use the same VAE. If that
    is in float32 already, it leaves it alone.
    """
    if dtype != torch.float16 or not hasattr(kind, "upcast_vae"):
        return False
    return bool(read_json(folder / "vae" / "config.json").get("force_upcast", True))


def _widening(decode: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(decode)
    def widened(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.float(), *args, **kwargs)

    return widened
