"""How each engine places a text-to-image pipeline. Imported in rank processes only.

Accelerate puts whole models of the pipeline on the devices there are, and can keep them in the
CPU's memory while they do not compute. MII's set-ups for text-to-image run the same way, since
MII itself no longer has that task but as an unmaintained part for older libraries. DeepSpeed's
ranks each hold the whole pipeline and paint different pictures: it splits language models only,
and its kernels for diffusers do not know today's transformers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from runners.config.base import ImageConfig
from runners.config.engines import AccelerateConfig, DeepSpeedConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.images.pipeline import load_pipeline
from runners.images.program import ImageProgram, image_program
from runners.rank.process_group import connect, meet
from runners.rank.program import RankContext

logger = logging.getLogger("triptych.imaging")

SEVERAL = ("auto", "balanced", "balanced_low_0", "sequential")
"""Strategies of `device_map`; for pipelines diffusers has one, `balanced`, which stands for all."""


def load_program(context: RankContext) -> ImageProgram:
    """The rank program of an image model on Accelerate, and on MII. Raises: ConfigError."""
    config = context.config
    device_map, max_memory = "auto", None
    if isinstance(config, AccelerateConfig):
        device_map, max_memory = _strategy(config.device_map), config.max_memory
    if config.world_size > 1:
        raise ConfigError("an image model runs on one rank; with engine deepspeed on several")
    return _load(context, device_map, max_memory)


def load_deepspeed_program(context: RankContext) -> ImageProgram:
    """The rank program of an image model on one of DeepSpeed's ranks. Raises: ConfigError."""
    config = context.config
    groups = connect(config, meet(context))
    if isinstance(config, DeepSpeedConfig) and config.deepspeed and context.rank == 0:
        logger.warning("ds-config.json is ignored: every rank holds the whole image model")
    program = _load(context, str(groups.device), None)
    # Rank 0 says when the model is ready, and the others get requests from then on.
    dist.barrier(groups.control)
    return program


def _load(context: RankContext, device_map: str, max_memory: Any) -> ImageProgram:
    config = context.config
    assert isinstance(config, ImageConfig)  # noqa: S101 - `create_runner` chose this program
    torch.set_num_threads(context.num_threads)
    context.progress(RunnerState.LOADING, f"loading weights from {config.name}")
    gpus = torch.cuda.device_count()
    if device_map not in SEVERAL:
        _refuse_absent(torch.device(device_map))
    on_cpu = not gpus if device_map in SEVERAL else device_map == "cpu"
    options: dict[str, Any] = {}
    spread = (
        device_map in SEVERAL and not config.cpu_offload and (gpus > 1 or (gpus and max_memory))
    )
    if spread:
        options = {"device_map": "balanced", "max_memory": max_memory}
    pipeline = load_pipeline(config, on_cpu=on_cpu, options=options)
    if not spread and not on_cpu:
        _place(pipeline, "cuda:0" if device_map in SEVERAL else device_map, config.cpu_offload)
    elif config.cpu_offload:
        logger.warning("cpu_offload is ignored: there is no GPU that weights could be kept off")
    return image_program(context, pipeline)


def _refuse_absent(device: torch.device) -> None:
    """Raises: ConfigError."""
    here = torch.accelerator.current_accelerator()
    same = here is not None and here.type == device.type
    count = torch.accelerator.device_count() if same else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ConfigError(
            f"device_map: {device} does not exist, this machine has {count} {device.type} devices"
        )


def _place(pipeline: Any, device: str, cpu_offload: str | None) -> None:
    """On one GPU, wholly or as far as it computes."""
    if cpu_offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif cpu_offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)


def _strategy(device_map: Any) -> str:
    """Raises: ConfigError for a map of modules, which diffusers does not take."""
    if isinstance(device_map, dict) and set(device_map) == {""} and device_map[""] != "disk":
        device = device_map[""]
        return f"cuda:{device}" if isinstance(device, int) else str(device)
    if not isinstance(device_map, str):
        raise ConfigError(
            "device_map of an image model must be auto, cpu or a GPU such as cuda:0; cpu_offload "
            "keeps weights off the GPU"
        )
    return device_map
