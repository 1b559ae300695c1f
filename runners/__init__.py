"""Runners: a model in rank processes behind an async facade. `create_runner` and
`create_task_runner` are the only doors.

Imports run one way: facade -> ranks; the engines (`*_runner`, `ragged`) are imported in rank
processes only, so that the HTTP worker never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runners.errors import ConfigError, EngineUnavailable

if TYPE_CHECKING:
    from runners.config import BaseRunnerConfig
    from runners.contracts import TaskRunner, TextRunner

# Where each engine's rank program lives; a rank imports it, the HTTP worker never does.
TEXT_PROGRAMS = {
    "accelerate": "runners.accelerate_runner:load_program",
    "deepspeed": "runners.deepspeed_runner:load_program",
    "mii": "runners.mii_runner:load_program",
}

TEXT_TASKS = ("text-generation", "conversational")
"""What a text model does; a conversation is a chat, continued."""
TASK_PROGRAM = "runners.task_programs:load_program"
TASK_ENGINES = ("accelerate", "mii")
"""MII serves text generation alone; its legacy tasks run on the Accelerate engine."""


def create_runner(config: BaseRunnerConfig) -> TextRunner:
    """A runner for `config`, not yet started.

    Raises: EngineUnavailable if this build holds no such engine for the task, ConfigError if the
    config is that of another node.
    """
    from runners.text_runner import RankedTextRunner

    program = rank_program(config)
    if config.first_rank:
        raise ConfigError(
            "node_rank must be 0 where the service runs; here, run: python -m runners.ranks.join"
        )
    return RankedTextRunner(config, program=program)


def create_task_runner(config: BaseRunnerConfig) -> TaskRunner:
    """A runner for a model of one of `contracts.PipelineTask`, not yet started.

    Raises: EngineUnavailable if the engine has no such task.
    """
    from runners.task_runner import RankedTaskRunner, on_accelerate

    engine = getattr(config, "engine", None)
    if engine not in TASK_ENGINES:
        raise EngineUnavailable(
            f"engine {engine} for {config.task} is not part of this version of Triptych; "
            f"{config.task} runs on: {', '.join(TASK_ENGINES)}"
        )
    return RankedTaskRunner(on_accelerate(config), program=TASK_PROGRAM)


def rank_program(config: BaseRunnerConfig) -> str:
    """`module:function` that loads the model in its ranks. Raises: EngineUnavailable."""
    engine = getattr(config, "engine", None)
    program = TEXT_PROGRAMS.get(str(engine))
    if config.task not in TEXT_TASKS or program is None:
        allowed = ", ".join(sorted(TEXT_PROGRAMS))
        raise EngineUnavailable(
            f"engine {engine} for {config.task} is not part of this version of Triptych; "
            f"text-generation runs on: {allowed}"
        )
    return program
