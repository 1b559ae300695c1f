"""`mii.modeling.models.load_model`, on the machine there is.

On CUDA it is MII's own, FastGen's kernels built under a lock that no killed build leaves behind.
Elsewhere the stand-in, whose model is loaded as the Accelerate engine does, or split over ranks as
the DeepSpeed engine does.
"""

from __future__ import annotations

import fcntl
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

from runners.config.mii import FASTGEN_BLOCK
from runners.config.model import AccelerateConfig, BaseRunnerConfig, DeepSpeedConfig
from runners.engines.mii.patches.stand_in import StandInEngine
from runners.rank.process_group import connect
from runners.text.loading import batch
from runners.text.lockstep import Ranks
from runners.text.parity import Proof

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
    model, proof, ranks = load_model_on_cpu(config)
    batched = batch(model, config, proof=proof, ranks=ranks)
    return StandInEngine(
        batched.engine(), model_config.inference_engine_config, max_context=batched.max_context
    )


def load_model_on_cpu(
    config: BaseRunnerConfig,
    progress: Callable[[str], None] = lambda _: None,
    store: Store | None = None,
) -> tuple[PreTrainedModel, Proof | None, Ranks | None]:
    """The model, or this rank's share of it with its proof and its group.

    `store`: where ranks meet, if not where the environment says. Raises: ConfigError.
    """
    if config.tensor_parallel == 1:
        from runners.engines import accelerate as accelerate_runner

        placed = AccelerateConfig(**_common(config), device_map="cpu")
        return accelerate_runner.load_model(placed, Path(tempfile.gettempdir())), None, None
    from runners.engines.deepspeed import load as deepspeed_runner

    # Which of the two launchers there are started this process decides what is set.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    split = DeepSpeedConfig(
        **_common(config), engine="deepspeed", tensor_parallel=config.tensor_parallel
    )
    groups = connect(config, store)
    ranks = Ranks(groups.control)
    model, proof = deepspeed_runner.load_split(split, groups, ranks, progress)
    return model, proof, ranks


def runner_config(model_config: ModelConfig) -> BaseRunnerConfig:
    """What MII's config says, in ours."""
    manager = model_config.inference_engine_config.state_manager
    memory = manager.memory_config
    allocated = str(getattr(memory.mode, "value", memory.mode)) == "allocate"
    path = local_folder(model_config.model_name_or_path)
    return BaseRunnerConfig(
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
    """torch builds extensions under a lock file, which a killed build leaves behind for everybody
    to wait on for ever. In a folder of ours such a file is stale while we hold a lock that ends
    with its process. A folder that somebody else chose is theirs to look after."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"
    folder = default / "extensions"
    if os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)) != str(folder):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".triptych.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob("**/lock"):
            stale.unlink(missing_ok=True)
        yield


def _common(config: BaseRunnerConfig) -> Mapping[str, Any]:
    return {name: getattr(config, name) for name in (*COMMON, "name", "model_path")}
