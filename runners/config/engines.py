"""The fields of a RunnerConfig that belong to one engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import override

from runners.config import deepspeed
from runners.config.base import BaseRunnerConfig
from runners.contracts.errors import ConfigError

DEVICE_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
Device = Annotated[str, Field(pattern=r"^(cpu|disk|(cuda|xpu|npu|mps)(:\d+)?)$")]
Size = Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)?\s*[KMGT]?i?B$")]
Index = Annotated[int, Field(ge=0)]


class AccelerateConfig(BaseRunnerConfig):
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
    """Folder for weights that fit neither GPU nor CPU; a relative path is inside a private folder
    that is removed with the process."""
    tensor_parallel: Literal[1] = 1
    """Always 1: Accelerate places layers, it does not split them."""

    @override
    def _used_gpus(self) -> int:
        devices: Iterable[int | str] = ["cuda:0"] if self.max_memory is None else self.max_memory
        if isinstance(self.device_map, dict):
            devices = self.device_map.values()
        elif self.device_map not in DEVICE_STRATEGIES:
            devices = [self.device_map]
        return 1 + max(map(_gpu_index, devices), default=-1)

    @field_validator("max_memory", mode="before")
    @classmethod
    def _gpu_indices(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in value.items()}

    @field_validator("device_map", mode="before")
    @classmethod
    def _disk_as_map(cls, value: object) -> object:
        # transformers takes `disk` inside a map only.
        return {"": "disk"} if value == "disk" else value

    @field_validator("offload_folder")
    @classmethod
    def _stay_inside(cls, value: str | None) -> str | None:
        if value is not None and ".." in Path(value).parts:
            raise ValueError("must not lead upwards with '..'")
        return value


class DeepSpeedConfig(BaseRunnerConfig):
    """DeepSpeed: `init_inference` tensor parallelism over `tensor_parallel` ranks."""

    engine: Literal["deepspeed"] = "deepspeed"
    """Chooses this engine."""
    deepspeed: dict[str, Any] = Field(default={})
    """DeepSpeed's own inference config: the content of a `ds-config.json`, or, as in TorchServe,
    `{"config": "ds-config.json"}` for such a file in the same folder. An imported model has the
    content."""

    @model_validator(mode="after")
    def _check_dtype(self) -> DeepSpeedConfig:
        try:
            deepspeed.dtype(self.deepspeed)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return self

    @property
    def chosen_dtype(self) -> str:
        """The dtype, of ds-config.json if that alone names one."""
        return deepspeed.dtype(self.deepspeed) or "auto" if self.dtype == "auto" else self.dtype


class MIIConfig(BaseRunnerConfig):
    """MII: DeepSpeed-MII, in our ranks or as a deployment of its processes."""

    engine: Literal["mii"] = "mii"
    """Chooses this engine."""


def _gpu_index(device: int | str) -> int:
    """The index of a GPU, -1 for another device."""
    if isinstance(device, int):
        return device
    device_type, _, index = device.partition(":")
    return int(index or 0) if device_type == "cuda" else -1
