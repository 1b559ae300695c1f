"""Runners: a model in rank processes behind an async facade. `create_runner`,
`create_image_runner` and `create_task_runner` are the only doors.

Imports run one way: facade -> ranks; the engines (`*_runner`, `*_programs`, `ragged`, `imaging`,
`tasks`) are imported in rank processes only, so that the HTTP worker never loads torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from runners.contracts.errors import ConfigError, EngineUnavailable
from runners.contracts.tasks import IMAGE_TASK, PIPELINE_TASKS, TEXT_TASKS

if TYPE_CHECKING:
    from runners.config.model import BaseRunnerConfig
    from runners.contracts.images import ImageRunner
    from runners.contracts.tasks import TaskRunner
    from runners.contracts.text import TextRunner

# Where each engine's rank program lives; a rank imports it, the HTTP worker never does.
TEXT_PROGRAMS = {
    "accelerate": "runners.engines.accelerate:load_program",
    "deepspeed": "runners.engines.deepspeed.load:load_program",
    "mii": "runners.engines.mii.load:load_program",
}
IMAGE_PROGRAMS = {
    "accelerate": "runners.engines.images:load_program",
    "deepspeed": "runners.engines.images:load_deepspeed_program",
    "mii": "runners.engines.images:load_program",
}
# MII serves text generation alone; its legacy tasks run on the Accelerate engine.
TASK_PROGRAMS = dict.fromkeys(("accelerate", "mii"), "runners.engines.tasks:load_program")
PROGRAMS = {
    **dict.fromkeys(TEXT_TASKS, TEXT_PROGRAMS),
    IMAGE_TASK: IMAGE_PROGRAMS,
    **dict.fromkeys(PIPELINE_TASKS, TASK_PROGRAMS),
}


def create_runner(config: BaseRunnerConfig) -> TextRunner:
    """A runner for a model of one of `TEXT_TASKS`, not yet started.

    Raises: EngineUnavailable if the engine does not have the task, ConfigError if the config is
    that of another task or node.
    """
    from runners.host.text_client import RankedTextRunner

    return RankedTextRunner(config, program=_program_here(config, TEXT_TASKS))


def create_image_runner(config: BaseRunnerConfig) -> ImageRunner:
    """A runner for an image model, not yet started.

    Raises: as `create_runner`.
    """
    from runners.host.image_client import RankedImageRunner

    return RankedImageRunner(config, program=_program_here(config, (IMAGE_TASK,)))


def create_task_runner(config: BaseRunnerConfig) -> TaskRunner:
    """A runner for a model of one of `contracts.tasks.PipelineTask`, not yet started.

    Raises: as `create_runner`.
    """
    from runners.host.task_client import RankedTaskRunner, on_accelerate

    program = _program_here(config, PIPELINE_TASKS)
    return RankedTaskRunner(on_accelerate(config), program=program)


def _program_here(config: BaseRunnerConfig, tasks: Collection[str]) -> str:
    if config.task not in tasks:
        raise ConfigError(f"{config.name} is a model for {config.task}, not {' or '.join(tasks)}")
    program = rank_program(config)
    if config.local_world_size < config.world_size and config.rendezvous is None:
        raise ConfigError("rdzv_endpoint is needed for several nodes: host:port of node 0")
    if config.first_rank:
        raise ConfigError(
            "node_rank must be 0 where the service runs; here, run: python -m cli.join"
        )
    return program


def rank_program(config: BaseRunnerConfig) -> str:
    """`module:function` that loads the model in its ranks. Raises: EngineUnavailable."""
    engine = str(getattr(config, "engine", None))
    programs = PROGRAMS[config.task]
    if engine not in programs:
        raise EngineUnavailable(
            f"engine {engine} for {config.task} is not part of this version of Triptych; "
            f"{config.task} runs on: {', '.join(sorted(programs))}"
        )
    return programs[engine]
