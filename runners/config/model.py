"""RunnerConfig: the one typed description of how a model is run.

`files.py` reads it from the files beside a model. `python -m runners.config.model` prints every
field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from runners.config import deepspeed as deepspeed_config
from runners.config.images import ImageFields
from runners.config.mii import MIISection
from runners.contracts.errors import ConfigError
from runners.contracts.tasks import IMAGE_TASK, PipelineTask

Engine = Literal["accelerate", "deepspeed", "mii"]
TextTask = Literal["text-generation", "conversational"]
Task = Literal[TextTask, "text-to-image", PipelineTask]
Dtype = Literal["auto", "float16", "bfloat16", "float32", "float64"]
DEVICE_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
Device = Annotated[str, Field(pattern=r"^(cpu|disk|(cuda|xpu|npu|mps)(:\d+)?)$")]
Size = Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)?\s*[KMGT]?i?B$")]
Index = Annotated[int, Field(ge=0)]

SETUP_CONFIG = "setup_config.json"
GIVEN = frozenset({"name", "model_path", "gpu_share"})
"""Fields that come from where the model lies and what is served beside it, not from its file."""


class BaseRunnerConfig(BaseModel):
    """What every engine understands."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    name: str
    """The name clients call the model by."""
    model_path: Path
    """The folder that holds `config.json` and the weights."""
    gpu_share: tuple[int, int, int] | None = None
    """Its first GPU, how many it gets, and how many all models here get: they keep to their own
    where there are just so many. None: it takes from all."""
    task: Task = "text-generation"
    """What the model does."""
    revision: str | None = None
    """The hub revision the weights came from; a record, the folder decides."""
    model_version: Annotated[str, Field(pattern=r"^[^/\s]{1,64}$")] = "1.0"
    """What clients of TorchServe call this version of the model by."""
    dtype: Dtype = "auto"
    """Weights' type. `auto`: the checkpoint's own, except that a CPU without fast half-precision
    arithmetic computes in float32. `torch_dtype` is an older name of it."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt in tokens, and the default of `max_new_tokens`, as TorchServe's Accelerate
    example used it. Default: what the model's context holds."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """How many tokens a request gets that does not say. Default: `max_length`, else 256."""
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Over how many ranks the model is split."""
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Sequences generated together in one step."""
    max_step_tokens: Annotated[int, Field(ge=16)] = 512
    """Tokens of one step, prompt chunks and running sequences together."""
    max_kv_tokens: Annotated[int, Field(ge=32)] | None = None
    """KV cache bound in tokens over all sequences, in blocks of 32. Default: from the free
    memory."""
    prefix_caching: bool = True
    """Whether prompts that begin alike share the KV of what they have in common."""
    weight_quantization: Literal["int8"] | None = None
    """`int8`: weights in 8 bits with a scale per output, on a CPU; faster, slightly less exact."""
    cpu_kernels: bool = True
    """Whether a model computed in float32 on a CPU runs on Triptych's own kernels, which are
    compiled at the first start and need a C++ compiler; without, on torch's."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per rank. Default: the machine's cores divided by the ranks."""
    start_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds from start to ready, after which the start has failed."""
    heartbeat_timeout: Annotated[float, Field(ge=1)] = 15.0
    """Seconds without a sign of life, after which a rank is taken for hung and replaced."""
    step_timeout: Annotated[float, Field(ge=1)] = 300.0
    """Seconds one step may take before its rank is taken for hung."""
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = None
    """GPUs that a deployment asks for on each of its machines; 0: none, it runs on CPUs. Default:
    one per rank and replica, or as many as `device_map` and `max_memory` name, `auto` alone one."""

    @property
    def world_size(self) -> int:
        """How many rank processes hold the model."""
        return self.tensor_parallel

    @property
    def local_world_size(self) -> int:
        """How many of them run on this machine."""
        return self.world_size

    @property
    def first_rank(self) -> int:
        """The first of them."""
        return 0

    @property
    def rendezvous(self) -> str | None:
        """`host:port` where the ranks of several machines meet; None if all are on this one."""
        return None

    @property
    def gpus_asked(self) -> int:
        """How many GPUs a deployment asks for on each of its machines."""
        return self._gpus_used() if self.gpus is None else self.gpus

    def _gpus_used(self) -> int:
        return self.local_world_size

    @property
    def places(self) -> int:
        """How many sequences or pictures are computed together; more of them wait."""
        return self.max_batch_size


class EngineConfig(ImageFields, BaseRunnerConfig):
    """What every engine understands, of text and of image models."""

    @property
    def places(self) -> int:
        """How many sequences or pictures are computed together; more of them wait."""
        images = self.task == IMAGE_TASK  # of which each rank paints its own
        return self.max_batch_images * self.world_size if images else super().places


def _gpu_index(device: int | str) -> int:
    """Which GPU a device is, -1 for none."""
    if isinstance(device, int):
        return device
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" else -1


class AccelerateConfig(EngineConfig):
    """Accelerate: `device_map` placement over GPUs, CPU and disk, in one rank."""

    engine: Literal["accelerate"] = "accelerate"
    """Chooses this engine."""
    device_map: (
        Literal["auto", "balanced", "balanced_low_0", "sequential"]
        | Device
        | dict[str, Index | Device]
    ) = "auto"
    """A strategy (`auto`, `balanced`, `balanced_low_0`, `sequential`), one device (`cpu`, `cuda:0`,
    `disk`), or module name to device."""
    max_memory: dict[Index | Device, Index | Size] | None = None
    """Device (GPU index, `cpu`) to bytes or a size such as `10GiB`."""
    offload_folder: str | None = None
    """Where weights go that fit neither GPU nor CPU; a relative path lies in a private folder that
    goes with the process."""
    tensor_parallel: Literal[1] = 1
    """Always 1: Accelerate places layers, it does not split them."""

    def _gpus_used(self) -> int:
        named: Iterable[int | str] = ["cuda:0"] if self.max_memory is None else self.max_memory
        if isinstance(self.device_map, dict):
            named = self.device_map.values()
        elif self.device_map not in DEVICE_STRATEGIES:
            named = [self.device_map]
        return 1 + max(map(_gpu_index, named), default=-1)

    @field_validator("max_memory", mode="before")
    @classmethod
    def _gpu_indices(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in value.items()}

    @field_validator("device_map", mode="before")
    @classmethod
    def _disk_alone(cls, value: object) -> object:
        # Only as a map does transformers take it.
        return {"": "disk"} if value == "disk" else value

    @field_validator("offload_folder")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is not None and ".." in Path(value).parts:
            raise ValueError("must not lead upwards with '..'")
        return value


class DeepSpeedConfig(EngineConfig):
    """DeepSpeed: `init_inference` tensor parallelism over `tensor_parallel` ranks."""

    engine: Literal["deepspeed"]
    """Chooses this engine."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own inference config: what a `ds-config.json` holds, or, as TorchServe has it,
    `{"config": "ds-config.json"}` for such a file beside this one. An imported model holds it."""
    shm_collectives: bool = False
    """Whether the ranks of a CPU add up through shared memory, by DeepSpeed's operator, which is
    compiled at the first start: several times faster if each thread has a core to itself, slower
    than the default, gloo, if not. All ranks are on one machine."""
    nnodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Over how many machines the ranks are spread, evenly."""
    node_rank: Annotated[int, Field(ge=0)] = 0
    """Which of the machines this is. The service runs on 0; the others run
    `python -m cli.join`."""
    rdzv_endpoint: (
        Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$|^\[[0-9a-fA-F:]+\]:\d{1,5}$")] | None
    ) = None
    """`host:port` of machine 0 where the machines meet, on a network that only they are on."""

    @property
    def local_world_size(self) -> int:
        """How many ranks run on this machine."""
        return self.world_size // self.nnodes

    @property
    def first_rank(self) -> int:
        """The first of them."""
        return self.node_rank * self.local_world_size

    @property
    def rendezvous(self) -> str | None:
        """Where the ranks of several machines meet; None if all are on this one."""
        return self.rdzv_endpoint if self.nnodes > 1 else None

    @model_validator(mode="after")
    def _nodes_agree(self) -> DeepSpeedConfig:
        if self.tensor_parallel % self.nnodes:
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} can not be spread evenly over "
                f"{self.nnodes} nodes"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank must be below nnodes, which is {self.nnodes}")
        if self.nnodes > 1 and self.shm_collectives:
            raise ValueError("shm_collectives is for ranks of one machine: nnodes must be 1")
        if self.nnodes > 1 and self.task == IMAGE_TASK:
            raise ValueError(
                "nnodes must be 1 for pictures, which the ranks of a machine share out"
            )
        port = int((self.rdzv_endpoint or ":1").rpartition(":")[2])
        if not 0 < port < 2**16:
            raise ValueError("rdzv_endpoint: the port must be from 1 to 65535")
        return self

    @model_validator(mode="after")
    def _sizes_agree(self) -> DeepSpeedConfig:
        try:
            size = deepspeed_config.tp_size(self.deepspeed)
            deepspeed_config.dtype(self.deepspeed)
        except ConfigError as error:
            raise ValueError(error.message) from None
        if size is not None and size != self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel (or torchrun's nproc-per-node) is {self.tensor_parallel}, but "
                f"ds-config.json's tensor_parallel.tp_size is {size}: they must be equal"
            )
        return self

    def computed_in(self, *, on_cpu: bool) -> str:
        """The dtype, `auto` if nobody says: what ds-config.json says of half precision is meant
        for GPUs."""
        if self.dtype != "auto":
            return self.dtype
        named = deepspeed_config.dtype(self.deepspeed) or "auto"
        return "auto" if on_cpu and named != "float32" else named


class MIIConfig(EngineConfig):
    """MII: DeepSpeed-MII, in our ranks or as a deployment of its own."""

    engine: Literal["mii"]
    """Chooses this engine."""
    mii: MIISection = MIISection()
    """What MII itself is told: its own fields, and how it is run."""

    @property
    def world_size(self) -> int:
        """Our rank processes: a persistent deployment has ranks of its own."""
        return self.tensor_parallel if self.mii.mode == "pipeline" else 1

    def _gpus_used(self) -> int:
        if self.task not in get_args(TextTask):  # which run on Accelerate
            return 1
        if self.mii.host is not None:  # a deployment elsewhere
            return 0
        return self.tensor_parallel * self.mii.replica_num

    @property
    def places(self) -> int:
        """How many sequences or pictures are computed together, over all replicas."""
        return super().places * self.mii.replica_num


RunnerConfig = Annotated[
    AccelerateConfig | DeepSpeedConfig | MIIConfig, Field(discriminator="engine")
]
runner_config_adapter: TypeAdapter[AccelerateConfig | DeepSpeedConfig | MIIConfig] = TypeAdapter(
    RunnerConfig
)


def validate(
    values: Mapping[str, Any], *, where: str = SETUP_CONFIG
) -> AccelerateConfig | DeepSpeedConfig | MIIConfig:
    """Values to a RunnerConfig. Raises: ConfigError that names the key and what is allowed."""
    try:
        return runner_config_adapter.validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError, *, name: Callable[[str], str] = str) -> str:
    """A ValidationError as one sentence that never repeats the offending value."""
    parts = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        loc = problem["loc"]
        where = [str(p) for p in (loc[1:] if loc[:1] and loc[0] in get_args(Engine) else loc)]
        # The names of a union's branches, which pydantic puts in between, mean nothing to a user.
        where = [p for p in where if re.fullmatch(r"[\w-]*", p) and p not in ("str", "int")]
        field = ".".join([name(where[0]), *where[1:]]) if where else "value"
        parts.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(dict.fromkeys(parts))


def describe_fields(
    model: type[BaseModel],
    *,
    name: Callable[[str], str] = str,
    beyond: type[BaseModel] = BaseModel,
) -> str:
    """A Markdown table of a model's fields, defaults and meanings, from its types.

    Those that `beyond` has too are left out.
    """
    rows = ["| name | default | meaning |", "|---|---|---|"]
    return "\n".join(rows + _rows(model, name, beyond))


def _rows(model: type[BaseModel], name: Callable[[str], str], beyond: type[BaseModel]) -> list[str]:
    rows = []
    for field, info in model.model_fields.items():
        if field in GIVEN or field in beyond.model_fields:
            continue
        if isinstance(info.default, BaseModel):  # a section: its fields, by their whole names
            outer = name(field)
            rows += _rows(type(info.default), f"{outer}.{{}}".format, BaseModel)
            continue
        default = "required" if info.is_required() else f"`{info.default}`"
        default = "" if info.default in (None, "") else default
        rows.append(
            f"| `{name(field)}` | {default} | {' '.join((info.description or '').split())} |"
        )
    return rows


def engine_model(engine: object) -> type[BaseRunnerConfig]:
    """The config of an engine. Raises: ConfigError if there is no such engine."""
    for model in (AccelerateConfig, DeepSpeedConfig, MIIConfig):
        if engine in get_args(model.model_fields["engine"].annotation):
            return model
    allowed = ", ".join(get_args(Engine))
    raise ConfigError(f"{SETUP_CONFIG}: engine must be one of {allowed}")


if __name__ == "__main__":
    for fields in (BaseRunnerConfig, ImageFields):
        print(f"### {fields.__doc__}\n\n{describe_fields(fields)}\n")
    for config in (AccelerateConfig, DeepSpeedConfig, MIIConfig):
        print(f"### {config.__doc__}\n\n{describe_fields(config, beyond=EngineConfig)}\n")
