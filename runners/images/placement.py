"""How a pipeline is prepared for its device: memory formats, offloading, compiled blocks.

Called by `runners.engines.images`, in rank processes.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate.hooks import UserCpuOffloadHook  # type: ignore[import-untyped]
from typing_extensions import override

from runners.contracts.errors import ConfigError
from runners.images.pipeline import denoiser_of
from runners.protocol.cache import CacheUnavailable, cache_folder

logger = logging.getLogger("triptych.images")

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
RECOMPILE_LIMIT = 64
"""Variants of a block: by size of its layers, by dtype, and for one row or several. Beyond the
limit, whose default is 8, torch runs it uncompiled without a word."""


def prepare_for_gpu(pipeline: Any) -> None:
    """Have convolutions run in the memory format and with the algorithms that suit a GPU."""
    # A search for the fastest algorithm would take time at every new shape, and choose by chance.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    for name in ("unet", "vae"):
        if (model := getattr(pipeline, name, None)) is not None:
            # cuDNN computes half precision in this format, and converts others in each convolution.
            # A model's own `to` refuses the kernels of videos, which have a dimension more.
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def place(pipeline: Any, device: str, cpu_offload: str | None) -> None:
    """Place a pipeline on one device, or offload it to the CPU while it does not compute."""
    if cpu_offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
        hooks = pipeline._all_hooks
        for each in hooks:
            each.hook.prev_module_hook = _Others([hook for hook in hooks if hook is not each])
    elif cpu_offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)


def compile_denoiser(pipeline: Any) -> None:
    """Have torch compile the denoiser's repeated blocks, each kind at its first call.

    Each block takes any number of rows, and any size. It is inside of the denoiser's `forward`,
    which is what offloading and batching wrap. CUDA graphs are not used: they would overwrite the
    results of a step that other images still need. Raises: ConfigError.
    """
    denoiser = denoiser_of(pipeline)
    kinds = getattr(denoiser, "_repeated_blocks", None) or ()
    if not any(type(module).__name__ in kinds for module in denoiser.modules()):
        raise ConfigError(
            f"{type(denoiser).__name__} has no repeated blocks to compile",
            field="compile_denoiser",
        )
    _keep_compiled_code()
    import torch._dynamo  # takes seconds
    from torch.fx.experimental import _config as symbols

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Otherwise sizes that are equal by chance in a first call, such as the lengths of two
    # sequences, are taken for the same size, and later calls are compiled again.
    symbols.use_duck_shape = False
    denoiser.compile_repeated_blocks(dynamic=True)


def _keep_compiled_code() -> None:
    """Have torch keep what it compiles in the user's cache, for later starts.

    Its default is in the folder for temporary files, which a rank's end removes.
    """
    if INDUCTOR_CACHE in os.environ:
        return
    try:
        os.environ[INDUCTOR_CACHE] = str(cache_folder("inductor"))
    except CacheUnavailable as error:
        logger.warning("the denoiser is compiled anew at each start: %s", error)


class _Others(UserCpuOffloadHook):  # type: ignore[misc]
    """All models but one, as its predecessor, which makes room for it on the GPU.

    diffusers has each model offload the one before it in a pipeline. Images at different steps call
    the models in any order.
    """

    def __init__(self, hooks: list[UserCpuOffloadHook]) -> None:
        self._hooks = hooks

    @property
    def model(self) -> torch.nn.Module:
        """One that is on the GPU, if there is any."""
        model: torch.nn.Module = (self._on_gpu() or self._hooks)[0].model
        return model

    @override
    def offload(self) -> None:
        for hook in self._on_gpu():
            hook.offload()

    def _on_gpu(self) -> list[UserCpuOffloadHook]:
        cpu = torch.device("cpu")
        return [hook for hook in self._hooks if next(hook.model.parameters()).device != cpu]
