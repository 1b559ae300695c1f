"""Runners: a model in rank processes behind an async client. `create_runner` is the only door.

The packages `engines`, `text`, `images`, `tasks`, `rank` and `hf` are imported in rank processes
only: the HTTP worker never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from runners.contracts.errors import ConfigError, EngineUnavailable
from runners.contracts.tasks import IMAGE_TASK, PIPELINE_TASKS, TEXT_TASKS

if TYPE_CHECKING:
    from runners.config.base import BaseRunnerConfig, ImageConfig, TaskConfig, TextConfig
    from runners.contracts.images import ImageRunner
    from runners.contracts.tasks import TaskRunner
    from runners.contracts.text import TextRunner

# Each engine's rank program, as module and function: imported by a rank, never by the HTTP worker.
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
# MII serves text generation only; its legacy tasks run on the Accelerate engine.
TASK_PROGRAMS = dict.fromkeys(("accelerate", "mii"), "runners.engines.tasks:load_program")
PROGRAMS = {
    **dict.fromkeys(TEXT_TASKS, TEXT_PROGRAMS),
    IMAGE_TASK: IMAGE_PROGRAMS,
    **dict.fromkeys(PIPELINE_TASKS, TASK_PROGRAMS),
}


@overload
def create_runner(config: TextConfig) -> TextRunner: ...
@overload
def create_runner(config: ImageConfig) -> ImageRunner: ...
@overload
def create_runner(config: TaskConfig) -> TaskRunner: ...
@overload
def create_runner(config: BaseRunnerConfig) -> Any: ...


def create_runner(config: BaseRunnerConfig) -> Any:
    """The runner of a model, not started yet; its type follows from the config's task.

    Raises: EngineUnavailable if the engine does not run the task, ConfigError if this machine is
    not the one that serves the model.
    """
    # Here, because rank processes import this package too and need no client.
    from runners.host.client import RankClient

    program = rank_program(config)
    if config.local_world_size < config.world_size and config.rendezvous is None:
        raise ConfigError("is needed for several nodes: host:port of node 0", field="rdzv_endpoint")
    if config.first_rank:
        raise ConfigError(
            "must be 0 where the service runs; here, run: python -m cli.join", field="node_rank"
        )
    return RankClient[Any, Any, Any](config, program=program)


def rank_program(config: BaseRunnerConfig) -> str:
    """`module:function` that loads the model in its ranks. Raises: EngineUnavailable."""
    programs = PROGRAMS[config.task]
    if config.engine not in programs:
        raise EngineUnavailable(
            f"engine {config.engine} does not run {config.task}, which runs on: "
            f"{', '.join(sorted(programs))}"
        )
    return programs[config.engine]
