"""The Accelerate engine: `device_map` places a model over GPUs, CPU and disk, in one rank.

Imported in rank processes only.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from runners.config.engines import AccelerateConfig
from runners.contracts.errors import ConfigError, IncompleteModel
from runners.contracts.runner import RunnerState
from runners.hf.dtypes import choose_dtype, compute_in_float32
from runners.hf.models import loading
from runners.rank.program import RankContext, RankProgram
from runners.text.loading import program_for_model

logger = logging.getLogger("triptych.accelerate")


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a text model on Accelerate. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, AccelerateConfig)  # noqa: S101 - `create_runner` chose this engine
    torch.set_num_threads(context.num_threads)
    context.progress(RunnerState.LOADING, f"loading weights from {config.name}")
    return program_for_model(context, load_model(config, context.work_dir))


def load_model(
    config: AccelerateConfig, work_dir: Path, head: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model on its devices; `head` is the auto class that loads it.

    Raises: IncompleteModel if weights are missing, which transformers would initialise at random;
    ConfigError for a model that cannot be loaded and for devices that do not exist.
    """
    _check_devices(config.device_map)
    options: dict[str, Any] = {"device_map": config.device_map}
    if config.max_memory is not None:
        options["max_memory"] = _without_absent_gpus(config.max_memory)
    if config.offload_folder is not None:
        options["offload_folder"] = str(work_dir / config.offload_folder)
    on_cpu = not torch.cuda.is_available() or _devices(config.device_map) <= {"cpu", "disk"}
    with loading(config.name):
        model_config = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
        loaded: Any = head.from_pretrained(
            config.model_path,
            config=model_config,
            dtype=choose_dtype(config.dtype, config.model_path, on_cpu=on_cpu),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    if missing := report["missing_keys"]:
        raise IncompleteModel.missing_weights(config.name, type(model), missing)
    if on_cpu:
        compute_in_float32(model)
    if "disk" in map(str, getattr(model, "hf_device_map", {}).values()):
        logger.warning("part of %s is on disk, which slows down every token", config.name)
    return cast(PreTrainedModel, model)


def _devices(device_map: str | dict[str, int | str]) -> set[int | str]:
    """The devices that a map names, or its strategy."""
    return {device_map} if isinstance(device_map, str) else {*device_map.values()}


def _check_devices(device_map: str | dict[str, int | str]) -> None:
    """Raises: ConfigError for a CUDA device that this machine lacks."""
    count = torch.cuda.device_count()
    for device in _devices(device_map):
        index = device if isinstance(device, int) else None
        if isinstance(device, str) and device.startswith("cuda"):
            index = int(device.partition(":")[2] or 0)
        if index is not None and index >= count:
            raise ConfigError(
                f"CUDA device {index} does not exist: this machine has {count}", field="device_map"
            )


def _without_absent_gpus(
    max_memory: dict[int | str, int | str],
) -> dict[int | str, int | str] | None:
    """The limits of the devices that this machine has, so that a larger machine's config works.

    None if none is left: an empty limit would allow no device and put the whole model on disk.
    """
    count = torch.cuda.device_count()
    absent = [key for key in max_memory if isinstance(key, int) and key >= count]
    if absent:
        logger.warning("max_memory: GPUs %s ignored: this machine has %d", absent, count)
    return {key: value for key, value in max_memory.items() if key not in absent} or None
