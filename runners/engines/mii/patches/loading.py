"""`mii.modeling.models.load_model`, with and without CUDA.

On CUDA it is MII's own; FastGen's kernels are built under a lock that a killed build does not leave
behind. Elsewhere it makes a `CPUInferenceEngine`, whose model is loaded as by the Accelerate
engine, or split over ranks as by the DeepSpeed engine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from mii.config import ModelConfig
from torch._C._distributed_c10d import Store
from transformers import PreTrainedModel

from runners.config.base import TextConfig
from runners.config.mii import FASTGEN_BLOCK
from runners.config.model import AccelerateTextConfig, DeepSpeedTextConfig, MIITextConfig
from runners.engines import accelerate
from runners.engines.deepspeed.load import load_split
from runners.engines.mii.deployment.plan import ENGINE_FIELDS
from runners.engines.mii.patches.cpu_engine import CPUInferenceEngine
from runners.protocol.cache import building, cache_folder
from runners.rank.process_group import connect
from runners.text.loading import prepare_model
from runners.text.lockstep import TPGroup
from runners.text.parity import ParityCheck

settings: dict[str, Any] = {}
"""Values of `ENGINE_FIELDS` in a process of a deployment, from its plan."""


def on_gpu() -> bool:
    """Whether MII runs on its own kernels in this process."""
    return torch.cuda.is_available()


def patched_load_model(original: Callable[[ModelConfig], Any]) -> Callable[[ModelConfig], Any]:
    """`load_model`; `original` is MII's own."""

    def load_model(model_config: ModelConfig) -> Any:
        if not on_gpu():
            return load_cpu_engine(model_config)
        with building_kernels():
            return original(model_config)

    return load_model


def load_cpu_engine(model_config: ModelConfig) -> CPUInferenceEngine:
    """The engine that MII's config describes, without CUDA. Raises: ConfigError."""
    if (num_threads := settings.get("num_threads")) is not None:
        torch.set_num_threads(num_threads)
    config = runner_config(model_config)
    model, parity, group = load_model_on_cpu(config)
    batched = prepare_model(model, config, parity=parity, group=group)
    return CPUInferenceEngine(
        batched.create_engine(),
        model_config.inference_engine_config,
        max_context=batched.max_context,
    )


def load_model_on_cpu(
    config: TextConfig,
    progress: Callable[[str], None] = lambda _: None,
    store: Store | None = None,
) -> tuple[PreTrainedModel, ParityCheck | None, TPGroup | None]:
    """The model, or this rank's share of it with its parity and its rank group.

    `progress`: takes a sentence at each phase of loading. `store`: where the ranks meet; None:
    where the environment says. Raises: ConfigError.
    """
    if config.tensor_parallel == 1:
        one_device = AccelerateTextConfig(**_shared_fields(config), device_map="cpu")
        return accelerate.load_model(one_device, Path(tempfile.gettempdir())), None, None
    # DeepSpeed's launcher does not set it.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    split = DeepSpeedTextConfig(**_shared_fields(config), tensor_parallel=config.tensor_parallel)
    groups = connect(config, store)
    group = TPGroup(groups.control)
    model, parity = load_split(split, groups, group, progress)
    return model, parity, group


def runner_config(model_config: ModelConfig) -> MIITextConfig:
    """MII's config as Triptych's."""
    manager = model_config.inference_engine_config.state_manager
    memory = manager.memory_config
    allocated = str(getattr(memory.mode, "value", memory.mode)) == "allocate"
    path = local_folder(model_config.model_name_or_path)
    return MIITextConfig(
        name=path.name,
        model_path=path,
        tensor_parallel=model_config.tensor_parallel,
        max_batch_size=min(manager.max_ragged_sequence_count, 64),
        max_step_tokens=max(manager.max_ragged_batch_size, 16),
        max_kv_tokens=memory.size * FASTGEN_BLOCK if allocated else None,
        **settings,
    )


def local_folder(name: str) -> Path:
    """A model's folder, or its files from the hub that contain no code."""
    if os.path.isdir(name):
        return Path(name)
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    return Path(snapshot_download(name, allow_patterns=patterns))


@contextmanager
def building_kernels() -> Iterator[None]:
    """Hold the lock of the folder in which FastGen's kernels are built.

    A folder that `TORCH_EXTENSIONS_DIR` names already is not locked.
    """
    folder = cache_folder("extensions")
    if os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)) != str(folder):
        yield
        return
    with building(folder):
        yield


def _shared_fields(config: TextConfig) -> Mapping[str, Any]:
    return {name: getattr(config, name) for name in (*ENGINE_FIELDS, "name", "model_path")}
