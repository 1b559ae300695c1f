"""The section `mii` of a `setup_config.json`.

The fields are those of MII 0.3.3's `ModelConfig`, `MIIConfig` and `GenerateParamsConfig`, under
their own names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

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
    deployment as `mii.serve` makes it, in separate processes, with MII's scheduler."""
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
    def _normalise(cls, value: object) -> object:
        return normalise(value)

    @property
    def max_total_tokens(self) -> int:
        """Maximum of prompt plus output in tokens: the least of MII's three limits."""
        limits = (self.max_length, self.generate.max_length)
        return min([self.inference_engine_config.state_manager.max_context, *filter(None, limits)])

    @model_validator(mode="after")
    def _check_mode(self) -> MIISection:
        persistent_only = {
            "replica_num": self.replica_num > 1,
            "host": self.host is not None,
            "keep_alive": self.keep_alive,
            "enable_restful_api": self.enable_restful_api,
        }
        fields = [name for name, is_set in persistent_only.items() if is_set]
        if self.mode == "pipeline" and fields:
            raise ValueError(f"{', '.join(fields)} needs mode persistent")
        if self.host is not None and self.port_number is None:
            raise ValueError("host needs port_number: where the deployment listens")
        if self.host is not None and (started := [name for name in fields if name != "host"]):
            raise ValueError(f"{', '.join(started)} has no effect with host: nothing is started")
        if self.replica_configs and len(self.replica_configs) != self.replica_num:
            raise ValueError(
                f"replica_configs describes {len(self.replica_configs)} replicas, but replica_num "
                f"is {self.replica_num}"
            )
        return self


def normalise(value: object) -> object:
    """A task or a type in our spelling, from any of MII's."""
    return value.replace("_", "-").lower() if isinstance(value, str) else value
