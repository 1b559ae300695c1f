"""`mii.modeling.models.load_model`, on the machine there is.

On CUDA it is MII's own, FastGen's kernels built under a lock that no killed build leaves behind.
Elsewhere the stand-in, whose model is loaded as the Accelerate engine does, or split over ranks as
the DeepSpeed engine does.
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
from runners.engines.mii.patches.stand_in import StandInEngine
from runners.protocol.cache import building, cache_folder
from runners.rank.process_group import connect
from runners.text.loading import prepare_model
from runners.text.lockstep import TPGroup
from runners.text.parity import ParityCheck

COMMON = frozenset({"dtype", "cpu_kernels", "weight_quantization", "prefix_caching", "num_threads"})
"""Fields of our own config that a stand-in has a use for."""

settings: dict[str, Any] = {}
"""Values of `COMMON` in this process, where another process's config decides them."""


def on_gpu() -> bool:
    """Whether MII runs on its own kernels here."""
    return torch.cuda.is_available()


def loader(stock: Callable[[ModelConfig], Any]) -> Callable[[ModelConfig], Any]:
    """`load_model`, with `stock` being MII's own."""

    def load_model(model_config: ModelConfig) -> Any:
        if not on_gpu():
            return load_stand_in(model_config)
        with building_kernels():
            return stock(model_config)

    return load_model


def load_stand_in(model_config: ModelConfig) -> StandInEngine:
    """The stand-in engine for what MII was told. Raises: ConfigError."""
    if settings.get("num_threads"):
        torch.set_num_threads(settings["num_threads"])
    config = runner_config(model_config)
    model, parity, group = load_model_on_cpu(config)
    batched = prepare_model(model, config, parity=parity, group=group)
    return StandInEngine(
        batched.create_engine(),
        model_config.inference_engine_config,
        max_context=batched.max_context,
    )


def load_model_on_cpu(
    config: TextConfig,
    progress: Callable[[str], None] = lambda _: None,
    store: Store | None = None,
) -> tuple[PreTrainedModel, ParityCheck | None, TPGroup | None]:
    """The model, or this rank's share of it with its parity check and its group.

    `store`: where ranks meet, if not where the environment says. Raises: ConfigError.
    """
    if config.tensor_parallel == 1:
        placed = AccelerateTextConfig(**_common(config), device_map="cpu")
        return accelerate.load_model(placed, Path(tempfile.gettempdir())), None, None
    # Our launcher sets it, that of `mii.serve` does not.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    split = DeepSpeedTextConfig(**_common(config), tensor_parallel=config.tensor_parallel)
    groups = connect(config, store)
    group = TPGroup(groups.control)
    model, parity = load_split(split, groups, group, progress)
    return model, parity, group


def runner_config(model_config: ModelConfig) -> MIITextConfig:
    """MII's config as ours."""
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
    """A model's folder, fetched from the hub if the name is none. Only what holds no code."""
    if os.path.isdir(name):
        return Path(name)
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    return Path(snapshot_download(name, allow_patterns=wanted))


@contextmanager
def building_kernels() -> Iterator[None]:
    """Hold the lock of the folder in which FastGen's kernels are built.

    A folder that the operator chose is left alone.
    """
    folder = cache_folder("extensions")
    if os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)) != str(folder):
        yield
        return
    with building(folder):
        yield


def _common(config: TextConfig) -> Mapping[str, Any]:
    return {name: getattr(config, name) for name in (*COMMON, "name", "model_path")}
