"""How each engine places a text-to-image pipeline. Called by the worker, in rank processes.

Accelerate places whole models of the pipeline on the available devices, and can keep them in CPU
memory while they do not compute. MII's setups for text-to-image run the same way: today's MII has
that task only as an unmaintained part for older libraries. DeepSpeed's ranks each hold the whole
pipeline and generate different images: DeepSpeed splits only language models, and its kernels for
diffusers do not support current versions of transformers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from runners.config.base import ImageConfig
from runners.config.engines import DEVICE_STRATEGIES, AccelerateConfig, DeepSpeedConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.images.pipeline import load_pipeline
from runners.images.placement import compile_denoiser, place, prepare_for_gpu
from runners.images.program import ImageProgram, image_program
from runners.rank.process_group import connect, meet
from runners.rank.program import RankContext

logger = logging.getLogger("triptych.images")


def load_program(context: RankContext) -> ImageProgram:
    """The rank program of an image model on Accelerate, and on MII. Raises: ConfigError."""
    config = context.config
    device_map, max_memory = "auto", None
    if isinstance(config, AccelerateConfig):
        device_map, max_memory = _device_or_strategy(config.device_map), config.max_memory
    if config.world_size > 1:
        raise ConfigError(
            f"an image model runs on one rank with engine {config.engine}; engine deepspeed runs "
            "it on several"
        )
    return _load(context, device_map, max_memory)


def load_deepspeed_program(context: RankContext) -> ImageProgram:
    """The rank program of an image model on one of DeepSpeed's ranks. Raises: ConfigError."""
    config = context.config
    groups = connect(config, meet(context))
    if isinstance(config, DeepSpeedConfig) and config.deepspeed and context.rank == 0:
        logger.warning("ds-config.json is ignored: every rank holds the whole image model")
    program = _load(context, str(groups.device), None)
    # Rank 0 reports that the model is ready; from then on the other ranks get requests too.
    dist.barrier(groups.control)
    return program


def _load(context: RankContext, device_map: str, max_memory: Any) -> ImageProgram:
    config = context.config
    assert isinstance(config, ImageConfig)  # noqa: S101 - `create_runner` chose this program
    torch.set_num_threads(context.num_threads)
    context.progress(RunnerState.LOADING, f"loading weights from {config.name}")
    gpus = torch.cuda.device_count()
    by_strategy = device_map in DEVICE_STRATEGIES
    if by_strategy:
        on_cpu = gpus == 0
    else:
        _check_device_exists(torch.device(device_map))
        on_cpu = device_map == "cpu"
    options: dict[str, Any] = {}
    # `balanced` is diffusers' only strategy. On one GPU it is needed only to limit the memory.
    if by_strategy and not config.cpu_offload and (gpus > 1 or (gpus and max_memory)):
        options = {"device_map": "balanced", "max_memory": max_memory}
    pipeline = load_pipeline(config, on_cpu=on_cpu, options=options)
    if not on_cpu:
        prepare_for_gpu(pipeline)
    if config.compile_denoiser:
        compile_denoiser(pipeline)
    if not options and not on_cpu:
        place(pipeline, "cuda:0" if by_strategy else device_map, config.cpu_offload)
    elif config.cpu_offload:
        logger.warning("cpu_offload is ignored: the image model runs on the CPU")
    return image_program(context, pipeline)


def _check_device_exists(device: torch.device) -> None:
    """Raises: ConfigError."""
    accelerator = torch.accelerator.current_accelerator()
    available = accelerator is not None and accelerator.type == device.type
    count = torch.accelerator.device_count() if available else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ConfigError(
            f"{device} does not exist, this machine has {count} {device.type} devices",
            field="device_map",
        )


def _device_or_strategy(device_map: str | dict[str, int | str]) -> str:
    """The one device or strategy that a `device_map` names.

    Raises: ConfigError for a map from modules to devices, which diffusers does not support.
    """
    if isinstance(device_map, str):
        return device_map
    if set(device_map) == {""} and device_map[""] != "disk":
        device = device_map[""]
        return f"cuda:{device}" if isinstance(device, int) else device
    raise ConfigError(
        "an image model takes auto, cpu or a GPU such as cuda:0; use cpu_offload to keep weights "
        "off the GPU",
        field="device_map",
    )
