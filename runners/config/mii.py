"""What `setup_config.json` says of DeepSpeed-MII: the section `mii`, and the files of its
forerunner, TorchServe's MII handler.

The fields are those of MII 0.3.3's `ModelConfig`, `MIIConfig` and `GenerateParamsConfig`, under
their own names; where a field means nothing here, its meaning says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from runners.contracts.errors import ConfigError

FASTGEN_BLOCK = 128
"""Tokens of a KV block of MII's engine."""

Port = Annotated[int, Field(ge=1, le=65_535)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )


class MemorySection(_Section):
    """How much KV there is."""

    mode: Literal["reserve", "allocate"] = "reserve"
    """`allocate`: `size` blocks of 128 tokens; `reserve`: all memory but `size` bytes, on a GPU."""
    size: Count = 1_000_000_000
    """See `mode`."""


class StateManagerSection(_Section):
    """Bounds of MII's ragged batches."""

    max_tracked_sequences: Count = 2048
    """Sequences the engine knows at once."""
    max_ragged_batch_size: Count | None = None
    """Tokens of one step. Default: `max_step_tokens`."""
    max_ragged_sequence_count: Count | None = None
    """Sequences of one step. Default: `max_batch_size`."""
    max_context: Count = 8192
    """Longest prompt plus output, in tokens."""
    memory_config: MemorySection = MemorySection()
    """How much KV there is."""
    offload: Literal[False] = False
    """Only false: MII has no KV offload."""


class TensorParallelSection(_Section):
    """How many ranks hold the model."""

    tp_size: Count = 1
    """The same as `tensor_parallel`."""


class QuantizationSection(_Section):
    """Weight-only quantization."""

    quantization_mode: Literal["wf6af16"] | None = None
    """The same as `mii.quantization_mode`."""


class EngineSection(_Section):
    """`RaggedInferenceEngineConfig`, as DeepSpeed has it."""

    tensor_parallel: Annotated[
        TensorParallelSection | None, Field(validation_alias=AliasChoices("tensor_parallel", "tp"))
    ] = None
    """How many ranks hold the model."""
    state_manager: Annotated[
        StateManagerSection, Field(validation_alias=AliasChoices("state_manager", "manager"))
    ] = StateManagerSection()
    """Bounds of the ragged batches."""
    quantization: QuantizationSection = QuantizationSection()
    """Weight-only quantization."""


class GenerateSection(_Section):
    """`GenerateParamsConfig`: what a request gets that does not say."""

    max_length: Count | None = None
    """Prompt plus output in tokens, at most."""
    max_new_tokens: Count | None = None
    """How many tokens are generated. The same as the top-level `max_new_tokens`."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """The end token is not taken before this many tokens."""
    stream: bool = False
    """Means nothing here: the route decides whether an answer is streamed."""
    ignore_eos: bool = False
    """Generate on after the end token."""
    return_full_text: Literal[False] = False
    """Only false: answers hold the new text."""
    do_sample: bool | None = None
    """False: greedy. Default: as the model's `generation_config.json` says."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the likeliest tokens that reach this probability together."""
    top_k: Count | None = None
    """Keep this many of the likeliest tokens."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Divides the logits."""
    stop: list[str] = []
    """Generation ends before the first of these strings. One string is taken as a list of it."""

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class ReplicaSection(_Section):
    """`ReplicaConfig`: where one replica runs."""

    hostname: Literal["", "localhost", "127.0.0.1"] = "localhost"
    """This machine."""
    tensor_parallel_ports: list[Port] = []
    """gRPC port of each rank; the first one is used. Default: free ones."""
    torch_dist_port: Port | None = None
    """Port of the ranks' rendezvous. Default: a free one."""
    gpu_indices: list[Annotated[int, Field(ge=0)]] = []
    """GPU of each rank."""
    zmq_port: Port | None = None
    """Port over which the first rank tells the others what to compute. Default: a free one."""


class MIISection(_Section):
    """The section `mii`."""

    mode: Literal["pipeline", "persistent"] = "pipeline"
    """`pipeline`: the model lives in Triptych's own ranks, driven by its scheduler. `persistent`: a
    deployment as `mii.serve` makes it, in processes of its own, with MII's scheduler."""
    host: Annotated[str, Field(pattern=r"^[\w.:-]+$")] | None = None
    """Where a deployment already runs, which listens on `port_number`: nothing is started."""
    keep_alive: bool = False
    """Whether a deployment that was started here outlives the server; the next one finds it."""
    deployment_name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """What `mii.client` finds the deployment by. Default: the model's name and `-mii-deployment`,
    which it finds by the model's name too."""
    deployment_type: Literal["local"] = "local"
    """Only `local`: MII's support of AML is gone."""
    port_number: Port | None = None
    """gRPC port of the load balancer, on loopback. Default: a free one."""
    enable_restful_api: bool = False
    """Whether the deployment answers `POST /mii/{deployment_name}` too."""
    restful_api_host: str = "localhost"
    """Where the REST gateway listens."""
    restful_api_port: Port | None = None
    """The REST gateway's port. Default: a free one."""
    restful_processes: Count = 32
    """Requests that the REST gateway serves at once."""
    replica_num: Annotated[int, Field(ge=1, le=1024)] = 1
    """Copies of the model, which take turns; each has `tensor_parallel` ranks."""
    replica_configs: list[ReplicaSection] = []
    """Where each replica runs. Default: all on this machine."""
    device_map: Literal["auto"] | dict[str, list[list[int]]] | list[list[int]] | list[int] | int = (
        "auto"
    )
    """GPU indices of each replica."""
    torch_dist_port: Port | None = None
    """Port of the ranks' rendezvous, 100 more for each further replica. Default: free ones."""
    zmq_port_number: Port | None = None
    """Port over which a replica's first rank tells the others what to compute, one more for each
    further replica. Default: free ones."""
    hostfile: str | None = None
    """Means nothing here: all replicas run on this machine."""
    version: int = 1
    """Means nothing here: it was AML's."""
    instance_type: str = "Standard_NC12s_v3"
    """Means nothing here: it was AML's."""
    model_name_or_path: str | None = None
    """A record; the folder decides which model it is."""
    tokenizer: str | None = None
    """A record; the tokenizer is the one in the folder."""
    quantization_mode: Literal["wf6af16"] | None = None
    """FP6 weights on a GPU of compute capability 8.x."""
    max_length: Count | None = None
    """Longest prompt plus output in tokens. Default: what the model's context holds."""
    sync_debug: bool = False
    """Has a deployment wait for the device after each part of a step."""
    profile_model_time: bool = False
    """Has a deployment log how long its steps take."""
    inference_engine_config: EngineSection = EngineSection()
    """DeepSpeed's `RaggedInferenceEngineConfig`."""
    generate: GenerateSection = GenerateSection()
    """`GenerateParamsConfig`: what a request gets that does not say."""

    @field_validator("deployment_type", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        return plain(value)

    @property
    def longest(self) -> int:
        """Prompt plus output in tokens, at most, as MII is told in three places."""
        asked = (self.max_length, self.generate.max_length)
        return min([self.inference_engine_config.state_manager.max_context, *filter(None, asked)])

    @model_validator(mode="after")
    def _fits_mode(self) -> MIISection:
        asked = {"replica_num": self.replica_num > 1, "host": self.host is not None}
        asked |= {n: getattr(self, n) for n in ("keep_alive", "enable_restful_api")}
        wrong = [name for name, given in asked.items() if given]
        if self.mode == "pipeline" and wrong:
            raise ValueError(f"{', '.join(wrong)} needs mode persistent")
        if self.host is not None and self.port_number is None:
            raise ValueError("host needs port_number: where the deployment listens")
        if self.host is not None and (started := [n for n in asked if n != "host" and asked[n]]):
            raise ValueError(f"{', '.join(started)} has no use with host: nothing is started")
        if self.replica_configs and len(self.replica_configs) != self.replica_num:
            raise ValueError(
                f"replica_configs describes {len(self.replica_configs)} replicas, but replica_num "
                f"is {self.replica_num}"
            )
        return self


FORERUNNERS = ("mii_config", "mii_configs")
"""What the forerunner's handler called the section, in its file and in its code."""

OBSOLETE = {
    **dict.fromkeys(
        ("load_with_sys_mem", "meta_tensor", "checkpoint_dict", "skip_model_check"),
        "weights are always memory-mapped from the model folder",
    ),
    **dict.fromkeys(
        ("enable_deepspeed", "enable_zero", "ds_config", "replace_with_kernel_inject"),
        "MII chooses its kernels by the machine",
    ),
    "enable_cuda_graph": "steps change their shape",
    "deploy_rank": "device_map says which GPUs",
    "hf_auth_token": "nothing is fetched while serving",
    "trust_remote_code": "a model that brings code is refused",
    "ckpt_config": "weights are always memory-mapped from the model folder",
    "provider": "the model folder says which library it is of",
    "ds_optimize": "MII paints no more: image models run as on Accelerate",
    "ds_zero": "device_map and max_memory place weights, with engine accelerate",
    "max_tokens": "max_length bounds prompt plus output",
}
"""Keys of MII's legacy `mii_config` that mean nothing any more, and what happens instead."""

BESIDE = (MIISection.model_fields.keys() | OBSOLETE.keys()) - {"max_length"}
"""Keys that a file for the forerunner's handler may have at the top, too."""

NO_USE = {
    "hostfile": "all replicas run on this machine",
    "version": "it was AML's",
    "instance_type": "it was AML's",
}

STARTED_ONLY = (
    *("deployment_name", "device_map", "replica_configs", "torch_dist_port", "zmq_port_number"),
    *("restful_api_host", "restful_api_port", "restful_processes"),
)
"""Keys that mean something where a deployment is started."""

DTYPES = {
    **dict.fromkeys(("fp16", "half", "float16", "torch.float16", "torch.half"), "float16"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp32", "float", "float32", "torch.float32", "torch.float"), "float32"),
}


def plain(value: object) -> object:
    """A task or a type as it is spelled here, from any of MII's spellings."""
    return value.replace("_", "-").lower() if isinstance(value, str) else value


def is_forerunners(raw: Mapping[str, Any]) -> bool:
    """Whether a file without `engine` is one for the forerunner's handler: of `{"model_name",
    "task"}` and perhaps more, or with its section."""
    return any(key in raw for key in FORERUNNERS) or {"model_name", "task"} <= raw.keys()


def read_section(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Whatever a file says of MII, as RunnerConfig has it: the section `mii`, and beside it what is
    the same for every engine (`tensor_parallel`, `dtype`, `max_batch_size` ...).

    Returns the values and a warning for each key without a meaning. Raises: ConfigError.
    """
    own = dict(values)
    if isinstance(own.get("dtype"), str):
        own["dtype"] = DTYPES.get(own["dtype"], own["dtype"])
    given = [key for key in ("mii", *FORERUNNERS) if own.get(key) is not None]
    if len(given) > 1:
        raise ConfigError(f"setup_config.json: {' and '.join(given)} are the same: give one")
    raw = own.pop(given[0]) if given else {}
    for key in FORERUNNERS:
        own.pop(key, None)
    if not isinstance(raw, Mapping):
        raise ConfigError(f"setup_config.json: {given[0]} must be an object")
    beside = {k: own.pop(k) for k in BESIDE & own.keys()}
    section = _flat(beside | {k: v for k, v in raw.items() if v is not None})
    if "task" in own:
        own["task"] = plain(own["task"])
    if (record := own.pop("model_name", None)) is not None:
        section.setdefault("model_name_or_path", record)
    warnings = _without_meaning(section)
    for key, value in _hoisted(section).items():
        if own.setdefault(key, value) != value:
            raise ConfigError(
                f"setup_config.json: {key} is {own[key]}, but mii says {value}: they must be equal"
            )
    return own | {"mii": section}, warnings


def drop_section(own: dict[str, Any]) -> list[str]:
    """Take out what says how MII generates text, of a model that does something else.

    Returns a warning for each key.
    """
    keys = [f"mii.{key}" for key in own.pop("mii", {}) if key != "model_name_or_path"]
    if own.pop("tensor_parallel", 1) != 1:
        keys.append("tensor_parallel")
    instead = f"MII serves text generation alone; {own['task']} runs as on engine accelerate"
    return [f"setup_config.json: {key} is ignored: {instead}" for key in keys]


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """MIIConfig's own `model_config` or `model_conf` is taken as if it stood beside it."""
    for key in ("model_config", "model_conf"):
        inner = raw.pop(key, {})
        if not isinstance(inner, Mapping):
            raise ConfigError(f"setup_config.json: mii.{key} must be an object")
        raw = {**inner, **raw}
    return raw


def _without_meaning(section: dict[str, Any]) -> list[str]:
    warnings = []
    for key, instead in OBSOLETE.items():
        if section.pop(key, None) is not None:
            warnings.append(f"setup_config.json: mii.{key} is obsolete and ignored: {instead}")
    for key, why in NO_USE.items():
        if section.get(key) is not None:
            warnings.append(f"setup_config.json: mii.{key} is ignored: {why}")
    if section.get("mode", "pipeline") == "pipeline":
        unused = dict.fromkeys(("port_number", *STARTED_ONLY), "it needs mode persistent")
    elif section.get("host") is not None:
        unused = dict.fromkeys(STARTED_ONLY, "the deployment at mii.host is not started here")
    else:
        unused = {}
    if section.get("tokenizer") not in (None, section.get("model_name_or_path")):
        unused["tokenizer"] = "the tokenizer is the one in the model folder"
    generate = section.get("generate")
    if isinstance(generate, Mapping) and "prompt_length" in generate:
        section["generate"] = {k: v for k, v in generate.items() if k != "prompt_length"}
        warnings.append(
            "setup_config.json: mii.generate.prompt_length is ignored: each prompt has its own"
        )
    return warnings + [
        f"setup_config.json: mii.{key} is ignored: {why}"
        for key, why in unused.items()
        if section.get(key) is not None
    ]


def _hoisted(section: dict[str, Any]) -> dict[str, Any]:
    """Takes out of the section what RunnerConfig has for every engine. Raises: ConfigError."""
    found: dict[str, Any] = {}
    if (task := section.pop("task", None)) is not None:
        found["task"] = plain(task)
    if (dtype := section.pop("dtype", None)) is not None:
        if dtype not in DTYPES:
            allowed = ", ".join(sorted(set(DTYPES.values())))
            raise ConfigError(f"setup_config.json: mii.dtype must be one of {allowed}")
        found["dtype"] = DTYPES[dtype]
    engine = section.get("inference_engine_config")
    engine = dict(engine) if isinstance(engine, Mapping) else {}
    parallel = engine.get("tensor_parallel", engine.get("tp"))
    size = parallel.get("tp_size") if isinstance(parallel, Mapping) else None
    if (size := section.pop("tensor_parallel", size)) is not None:
        found["tensor_parallel"] = size
    manager = engine.get("state_manager", engine.get("manager"))
    if isinstance(manager, Mapping):
        sizes = {
            "max_batch_size": manager.get("max_ragged_sequence_count"),
            "max_step_tokens": manager.get("max_ragged_batch_size"),
        }
        memory = manager.get("memory_config")
        if isinstance(memory, Mapping) and memory.get("mode") == "allocate":
            blocks = memory.get("size")
            sizes["max_kv_tokens"] = FASTGEN_BLOCK * blocks if isinstance(blocks, int) else None
        found |= {name: value for name, value in sizes.items() if value is not None}
    generate = section.get("generate")
    if isinstance(generate, Mapping) and generate.get("max_new_tokens") is not None:
        found["max_new_tokens"] = generate["max_new_tokens"]
    return found
