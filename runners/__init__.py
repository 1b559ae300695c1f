"""Runners: a model in rank processes behind an async facade. `create_runner` and
`create_image_runner` are the only doors.

Imports run one way: facade -> ranks; the engines (`*_runner`, `ragged`) are imported in rank
processes only, so that the HTTP worker never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runners.errors import ConfigError, EngineUnavailable

if TYPE_CHECKING:
    from runners.config import BaseRunnerConfig
    from runners.contracts import ImageRunner, TextRunner

# Where each engine's rank program lives; a rank imports it, the HTTP worker never does.
TEXT_PROGRAMS = {
    "accelerate": "runners.accelerate_runner:load_program",
    "deepspeed": "runners.deepspeed_runner:load_program",
    "mii": "runners.mii_runner:load_program",
}


IMAGE_PROGRAMS = {
    "accelerate": "runners.image_programs:load_program",
    "deepspeed": "runners.image_programs:load_deepspeed_program",
    "mii": "runners.image_programs:load_program",
}
PROGRAMS = {"text-generation": TEXT_PROGRAMS, "text-to-image": IMAGE_PROGRAMS}


def create_runner(config: BaseRunnerConfig) -> TextRunner:
    """A runner for a text model, not yet started.

    Raises: EngineUnavailable if this build holds no such engine for the task, ConfigError if the
    config is that of another node.
    """
    from runners.text_runner import RankedTextRunner

    return RankedTextRunner(config, program=_program_here(config, "text-generation"))


def create_image_runner(config: BaseRunnerConfig) -> ImageRunner:
    """A runner for an image model, not yet started.

    Raises: as `create_runner`.
    """
    from runners.image_runner import RankedImageRunner

    return RankedImageRunner(config, program=_program_here(config, "text-to-image"))


def _program_here(config: BaseRunnerConfig, task: str) -> str:
    program = rank_program(config, task)
    if config.first_rank:
        raise ConfigError(
            "node_rank must be 0 where the service runs; here, run: python -m runners.ranks.join"
        )
    return program


def rank_program(config: BaseRunnerConfig, task: str = "text-generation") -> str:
    """`module:function` that loads the model in its ranks. Raises: EngineUnavailable."""
    programs = PROGRAMS[task]
    engine = str(getattr(config, "engine", None))
    if config.task != task or engine not in programs:
        raise EngineUnavailable(
            f"engine {engine} for {config.task} is not part of this version of Triptych; "
            f"{task} runs on: {', '.join(sorted(programs))}"
        )
    return programs[engine]
