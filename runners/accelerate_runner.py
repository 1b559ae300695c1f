"""The Accelerate engine: a model placed by `device_map` over GPUs, CPU and disk, in one rank.

Imported in rank processes only.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from runners.config import DEVICE_STRATEGIES, AccelerateConfig
from runners.contracts import RunnerState
from runners.errors import ConfigError
from runners.ragged.loading import choose_dtype, text_program
from runners.ragged.program import TextProgram
from runners.ranks.worker import RankContext

logger = logging.getLogger("triptych.accelerate")


def load_program(context: RankContext) -> TextProgram:
    """The rank program of a text model on Accelerate. Raises: ConfigError."""
    config = context.config
    if not isinstance(config, AccelerateConfig):
        raise ConfigError(f"the Accelerate engine was given a config for {config.engine}")
    torch.set_num_threads(context.num_threads)
    context.progress(RunnerState.LOADING, f"loading weights from {config.model_path.name}")
    return text_program(context, load_model(config, context.work_dir))


def load_model(config: AccelerateConfig, work_dir: Path) -> PreTrainedModel:
    """The model, placed. Raises: ConfigError for a placement this machine can not do."""
    options: dict[str, Any] = {"device_map": _device_map(config.device_map)}
    if config.max_memory is not None:
        options["max_memory"] = _present(config.max_memory)
    if config.offload_folder is not None:
        options["offload_folder"] = str(work_dir / config.offload_folder)
    model_config = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.model_path,
            config=model_config,
            dtype=choose_dtype(config.dtype, model_config),
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{config.model_path.name} can not be loaded: {error}") from error
    return model


def _device_map(wanted: str | dict[str, int | str]) -> str | dict[str, int | str]:
    if isinstance(wanted, str) and wanted not in DEVICE_STRATEGIES:
        try:
            device = torch.device(wanted)
        except RuntimeError:
            raise ConfigError(
                f"device_map: {wanted!r} is neither a device nor one of "
                f"{', '.join(DEVICE_STRATEGIES)}, disk"
            ) from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"device_map: {wanted} does not exist, this machine has "
                f"{torch.cuda.device_count()} CUDA devices"
            )
    return wanted


def _present(max_memory: dict[int | str, int | str]) -> dict[int | str, int | str]:
    """Without the GPUs this machine lacks: a set-up written for a larger one still runs."""
    count = torch.cuda.device_count()
    absent = [key for key in max_memory if isinstance(key, int) and key >= count]
    if absent:
        logger.warning("max_memory names GPUs %s, this machine has %d: ignored", absent, count)
    return {key: value for key, value in max_memory.items() if key not in absent}
