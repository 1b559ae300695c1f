"""RunnerConfig: the one typed description of how a model is run, by engine and task.

`files.py` reads it from the files of a model folder. `python -m runners.config.model` prints every
field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError, model_validator
from typing_extensions import override

from runners.config.base import (
    BaseRunnerConfig,
    Engine,
    ImageConfig,
    Task,
    TaskConfig,
    TextConfig,
)
from runners.config.describe import describe_fields
from runners.config.engines import AccelerateConfig, DeepSpeedConfig, MIIConfig
from runners.config.mii import MIISection
from runners.contracts.errors import ConfigError, EngineUnavailable
from runners.contracts.tasks import IMAGE_TASK, TEXT_TASKS
from runners.contracts.validation import problems_of

SETUP_CONFIG = "setup_config.json"


class AccelerateTextConfig(AccelerateConfig, TextConfig):
    """A text model on Accelerate."""


class AccelerateImageConfig(AccelerateConfig, ImageConfig):
    """An image model on Accelerate."""


class AccelerateTaskConfig(AccelerateConfig, TaskConfig):
    """A model for a pipeline task on Accelerate."""


class DeepSpeedTextConfig(DeepSpeedConfig, TextConfig):
    """A text model on DeepSpeed."""

    shm_collectives: bool = False
    """Whether the ranks of a CPU sum through shared memory, by DeepSpeed's operator, which is
    compiled at the first start: several times faster than the default, gloo, if each thread has a
    core to itself, else slower. All ranks are on one machine."""
    nnodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of machines that the ranks are spread over, evenly."""
    node_rank: Annotated[int, Field(ge=0)] = 0
    """The index of this machine. The service runs on 0; the others run `python -m cli.join`."""
    rdzv_endpoint: (
        Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$|^\[[0-9a-fA-F:]+\]:\d{1,5}$")] | None
    ) = None
    """`host:port` of machine 0 where the machines meet, on an isolated network."""

    @property
    @override
    def local_world_size(self) -> int:
        return self.world_size // self.nnodes

    @property
    @override
    def first_rank(self) -> int:
        return self.node_rank * self.local_world_size

    @property
    @override
    def rendezvous(self) -> str | None:
        return self.rdzv_endpoint if self.nnodes > 1 else None

    @model_validator(mode="after")
    def _check_nodes(self) -> DeepSpeedTextConfig:
        if self.tensor_parallel % self.nnodes:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} cannot be spread evenly over "
                f"{self.nnodes} nodes"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank must be below nnodes, which is {self.nnodes}")
        if self.nnodes > 1 and self.shm_collectives:
            raise ValueError("shm_collectives is for ranks of one machine: nnodes must be 1")
        port = int((self.rdzv_endpoint or ":1").rpartition(":")[2])
        if not 0 < port < 2**16:
            raise ValueError("rdzv_endpoint: the port must be from 1 to 65535")
        return self


class DeepSpeedImageConfig(DeepSpeedConfig, ImageConfig):
    """An image model on DeepSpeed.

    Every rank holds the whole model.
    """


class MIITextConfig(MIIConfig, TextConfig):
    """A text model on MII."""

    mii: MIISection = MIISection()
    """MII's own fields, and how MII is run."""

    @property
    @override
    def world_size(self) -> int:
        # A persistent deployment has separate ranks, apart from our one process.
        return self.tensor_parallel if self.mii.mode == "pipeline" else 1

    @override
    def _used_gpus(self) -> int:
        if self.mii.host is not None:  # a deployment on another machine
            return 0
        return self.tensor_parallel * self.mii.replica_num

    @property
    @override
    def max_concurrency(self) -> int:
        return super().max_concurrency * self.mii.replica_num


class MIIImageConfig(MIIConfig, ImageConfig):
    """An image model on MII.

    It runs as on Accelerate.
    """


class MIITaskConfig(MIIConfig, TaskConfig):
    """A model for a pipeline task on MII.

    It runs as on Accelerate.
    """


_CONFIGS: tuple[type[BaseRunnerConfig], ...] = (
    AccelerateTextConfig,
    AccelerateImageConfig,
    AccelerateTaskConfig,
    DeepSpeedTextConfig,
    DeepSpeedImageConfig,
    MIITextConfig,
    MIIImageConfig,
    MIITaskConfig,
)


def task_config(task: Task) -> type[TextConfig | ImageConfig | TaskConfig]:
    """The type with the fields of a task."""
    if task in TEXT_TASKS:
        return TextConfig
    return ImageConfig if task == IMAGE_TASK else TaskConfig


def config_class(engine: object, task: object) -> type[BaseRunnerConfig]:
    """The type of the config of an engine and a task.

    Raises: ConfigError if there is no such engine or task, EngineUnavailable if the engine does not
    run the task.
    """
    for field, value, allowed in (("engine", engine, Engine), ("task", task, Task)):
        if value not in get_args(allowed):
            raise ConfigError(
                f"must be one of {', '.join(get_args(allowed))}", field=field, source=SETUP_CONFIG
            )
    task_type = task_config(task)  # type: ignore[arg-type]  # checked above
    configs = [config for config in _CONFIGS if issubclass(config, task_type)]
    engines = {str(config.model_fields["engine"].default): config for config in configs}
    if engine not in engines:
        raise EngineUnavailable(
            f"engine {engine} does not run {task}, which runs on: {', '.join(sorted(engines))}"
        )
    return engines[str(engine)]


def fields_of(engine: object = None) -> dict[str, list[type[BaseRunnerConfig]]]:
    """Every field of an engine's configs, or of all, to the configs that have it."""
    fields: dict[str, list[type[BaseRunnerConfig]]] = {}
    for config in _CONFIGS:
        if engine in (None, config.model_fields["engine"].default):
            for field in config.model_fields:
                fields.setdefault(field, []).append(config)
    return fields


def describe(cls: type[BaseRunnerConfig]) -> str:
    """What a config is for, such as `a text model on DeepSpeed`."""
    text = (cls.__doc__ or "").strip().partition(".")[0]
    return text[0].lower() + text[1:]


def owners_of(field: str) -> str:
    """The configs that have a field, in words; empty if none has it."""
    return " or ".join(describe(config) for config in fields_of().get(field, []))


def validate(values: Mapping[str, Any], *, source: str = SETUP_CONFIG) -> BaseRunnerConfig:
    """Values as a RunnerConfig; `engine` defaults to accelerate, `task` to text-generation.

    Raises: ConfigError that names the key and what is allowed; EngineUnavailable.
    """
    cls = config_class(values.get("engine", "accelerate"), values.get("task", "text-generation"))
    for key in sorted(values.keys() - cls.model_fields.keys()):
        if owners := owners_of(key):
            raise ConfigError(
                f"belongs to {owners}, and this is {describe(cls)}", field=key, source=source
            )
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        problems = problems_of(error)
        reason = "; ".join(f"{p.field or 'value'}: {p.requirement}" for p in problems)
        raise ConfigError(reason, source=source) from None


def load_runner_config(content: bytes) -> BaseRunnerConfig:
    """A RunnerConfig from its own JSON."""
    return validate(json.loads(content))


if __name__ == "__main__":
    for task_type in (TextConfig, ImageConfig, TaskConfig):
        print(f"### {task_type.__doc__}\n\n{describe_fields(task_type)}\n")
    for config in _CONFIGS:
        bases = [base for base in (TextConfig, ImageConfig, TaskConfig) if issubclass(config, base)]
        print(f"### {config.__doc__}\n\n{describe_fields(config, without=bases[0])}\n")
