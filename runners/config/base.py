"""The fields of a RunnerConfig that every engine has, and those of each kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import override

from runners.contracts.images import MAX_PIXELS
from runners.contracts.tasks import PipelineTask

Engine = Literal["accelerate", "deepspeed", "mii"]
TextTask = Literal["text-generation", "conversational"]
ImageTask = Literal["text-to-image"]
Task = Literal[TextTask, ImageTask, PipelineTask]
AttentionKernel = Literal["auto", "cpu", "triton", "varlen", "torch"]
Dtype = Literal["auto", "float16", "bfloat16", "float32", "float64"]

DTYPES = {
    **dict.fromkeys(("torch.float16", "float16", "fp16", "half", "torch.half"), "float16"),
    **dict.fromkeys(("torch.bfloat16", "bfloat16", "bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("torch.float32", "float32", "fp32", "float", "torch.float"), "float32"),
}
"""The names of types in DeepSpeed's and MII's files to ours."""

DERIVED_FIELDS = frozenset({"name", "model_path", "gpu_share"})
"""Fields that follow from where the model is stored and what is served with it, not from a file."""


class GpuShare(NamedTuple):
    """The GPUs of one of several models on a machine."""

    first: int
    """Index of its first GPU."""
    size: int
    """How many GPUs it gets."""
    total: int
    """How many all models get; a machine with another number of GPUs is not divided."""


class BaseRunnerConfig(BaseModel, ABC):
    """Every engine and every task."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    if TYPE_CHECKING:
        # Fields of the engines' and the tasks' configs: as fields here they would hide those.
        engine: Engine
        task: Task

    name: str
    """The name clients call the model by."""
    model_path: Path
    """The folder with `config.json` and the weights."""
    gpu_share: GpuShare | None = None
    """Its part of the GPUs; None: all."""
    revision: str | None = None
    """The hub revision the weights came from; a record, the folder decides."""
    model_version: Annotated[str, Field(pattern=r"^[^/\s]{1,64}$")] = "1.0"
    """The version in TorchServe's routes."""
    dtype: Dtype = "auto"
    """Type of the weights, and of the arithmetic; on a CPU, that is float32 where the weights are
    float16 or bfloat16. `auto`: the checkpoint's own. `torch_dtype` is an older name of it."""
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of ranks that the model is split over."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per rank. Default: the machine's cores divided by the ranks."""
    start_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds from start to ready, after which the start has failed."""
    heartbeat_timeout: Annotated[float, Field(ge=1)] = 15.0
    """Seconds without a heartbeat, after which a rank is considered hung and is replaced."""
    step_timeout: Annotated[float, Field(ge=1)] = 300.0
    """Seconds one step may take before its rank is considered hung."""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each GPU's memory that the model may take, its KV cache included. Default: 0.9, or
    where several models have to share GPUs, its part of that."""
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = None
    """GPUs that a deployment requests on each machine; 0: none, the model runs on CPUs. Default:
    one per rank and replica, or as many as `device_map` and `max_memory` name, `auto` alone one."""

    @property
    def world_size(self) -> int:
        """Number of rank processes that hold the model."""
        return self.tensor_parallel

    @property
    def local_world_size(self) -> int:
        """Number of ranks on this machine."""
        return self.world_size

    @property
    def first_rank(self) -> int:
        """The first rank on this machine."""
        return 0

    @property
    def serving_ranks(self) -> int:
        """Ranks that take requests: rank 0 for all, or each rank that holds the whole model."""
        return 1

    @property
    def rendezvous(self) -> str | None:
        """`host:port` where the ranks of several machines meet; None if all are on this one."""
        return None

    @property
    def requested_gpus(self) -> int:
        """GPUs that a deployment requests on each machine."""
        return self._used_gpus() if self.gpus is None else self.gpus

    def _used_gpus(self) -> int:
        return self.local_world_size

    @property
    @abstractmethod
    def max_concurrency(self) -> int:
        """Requests that are computed together; further requests are queued."""


class TextConfig(BaseRunnerConfig):
    """Text models, on every engine."""

    task: TextTask = "text-generation"
    """What the model does: `text-generation` or `conversational`, a chat."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Maximum prompt length in tokens, and the default of `max_new_tokens`, as in TorchServe's
    Accelerate example. Default: the model's context."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Generated tokens of a request that sets no limit. Default: `max_length`, else that of
    `generation_config.json`, else 256, or for a chat what fits the context."""
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Sequences in one step."""
    max_step_tokens: Annotated[int, Field(ge=16)] = 512
    """Tokens in one step, prompt chunks and running sequences together."""
    max_kv_tokens: Annotated[int, Field(ge=32)] | None = None
    """Size of the KV cache in tokens, in blocks of 32. Default: from the free memory."""
    prefix_caching: bool = True
    """Whether prompts with the same beginning share its KV."""
    weight_quantization: Literal["int8"] | None = None
    """`int8`: 8-bit weights with a scale per output, on a CPU; faster, slightly less exact."""
    cpu_kernels: bool = True
    """Whether a model on a CPU runs on Triptych's own kernels, which are compiled at the first
    start and need a C++ compiler; otherwise it runs on torch's, and 16-bit weights take twice the
    memory."""
    attention_kernel: AttentionKernel = "auto"
    """What computes attention: on a GPU Triptych's own kernel `triton`, torch's FlashAttention
    `varlen`, or `torch`, slowly, for what no kernel can; `auto` is the fastest that is proved equal
    at the start. On a CPU `auto` and `cpu` are Triptych's kernels for CPUs; `torch`, and `triton`
    in Triton's interpreter, try the path of a GPU there."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache on a GPU: `auto`, that of the model, or `fp8` (e4m3), which takes half
    of the memory and is slightly less exact."""
    cuda_graphs: bool = True
    """Whether decoding steps on a GPU run as CUDA graphs, captured while the model serves."""
    graph_memory: Annotated[int, Field(ge=0)] = 1024
    """MiB of each GPU that the graphs may take."""
    overlap: bool = True
    """Whether a step on a GPU is submitted while the one before runs."""
    batch_invariant: bool = True
    """Whether a GPU computes a request with the same bits alone and in any batch. `false` takes
    the libraries' own matrix products, whose rounding depends on the batch."""

    @property
    @override
    def max_concurrency(self) -> int:
        return self.max_batch_size


class ImageConfig(BaseRunnerConfig):
    """Text-to-image models, on every engine."""

    task: ImageTask = "text-to-image"
    """What the model does: `text-to-image`."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps of a request that sets none. Default: the pipeline's own."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """Guidance scale of a request that sets none. Default: the pipeline's own."""
    max_batch_images: Annotated[int, Field(ge=1, le=256)] = 8
    """Images that a rank generates together in one step."""
    max_pixels: Annotated[int, Field(ge=64, le=MAX_PIXELS)] | None = None
    """Maximum of height times width; at most 8192 times 8192. Default: four times the model's own
    size."""
    max_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 200
    """Maximum of denoising steps."""
    cpu_offload: Literal["model", "sequential"] | None = None
    """Keeps the weights in CPU memory and on the GPU only the part that computes: one `model` of
    the pipeline at a time, or, slower and with the least memory, one layer: `sequential`."""
    attention_slicing: bool = False
    """Computes a U-Net's attention head by head: less memory, slower. No effect on transformers."""
    vae_slicing: bool = False
    """Decodes images one by one: less memory."""
    vae_tiling: bool = False
    """Decodes an image in overlapping tiles: less memory for large images."""
    compile_denoiser: bool = False
    """Whether torch compiles the repeated blocks of the denoiser: faster steps on a GPU, after a
    first start that takes minutes; it keeps the result in the user's cache folder. It needs a C++
    compiler, and excludes `cpu_offload` `sequential`."""

    @model_validator(mode="after")
    def _check_compilation(self) -> ImageConfig:
        if self.compile_denoiser and self.cpu_offload == "sequential":
            raise ValueError(
                "compile_denoiser compiles whole blocks, which cpu_offload sequential moves layer "
                "by layer; use cpu_offload model, or none"
            )
        return self

    @property
    @override
    def serving_ranks(self) -> int:
        return self.world_size

    @property
    @override
    def max_concurrency(self) -> int:
        return self.max_batch_images * self.world_size


class TaskConfig(BaseRunnerConfig):
    """Models for fill-mask, token-classification, question-answering and text-classification."""

    task: PipelineTask
    """What the model does. Default: as the architecture in `config.json` says."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Maximum input length in tokens. Default: the model's context."""
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Inputs in one forward."""

    @property
    @override
    def max_concurrency(self) -> int:
        return self.max_batch_size
