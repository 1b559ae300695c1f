"""Schedulers by their usual names, as far as they are compatible with a pipeline.

Used by the image program and its generator, in rank processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch

NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++_2m": "DPMSolverMultistepScheduler",
    "dpm++_2s": "DPMSolverSinglestepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "flow_match_euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class Schedulers:
    """The schedulers that a pipeline can use; `default` is the one it was loaded with."""

    def __init__(self, default: Any) -> None:
        self._default = default
        compatible = {cls.__name__ for cls in default.compatibles}
        self.names = [
            name
            for name, class_name in NAMES.items()
            if class_name == type(default).__name__
            or (class_name in compatible and self._is_usable(getattr(diffusers, class_name)))
        ]

    @property
    def default_name(self) -> str:
        """The name of the pipeline's default scheduler; empty if it has none in `NAMES`."""
        default = type(self._default).__name__
        return next((name for name, class_name in NAMES.items() if class_name == default), "")

    def make(self, name: str | None) -> Any:
        """A new scheduler for one image, configured as the default one; None makes a default."""
        cls = getattr(diffusers, NAMES[name]) if name else type(self._default)
        scheduler = cls.from_config(self._default.config)
        _HostTimesteps(scheduler)
        return scheduler

    def _is_usable(self, cls: Any) -> bool:
        # Some need packages that are not installed, some reject another scheduler's config.
        try:
            cls.from_config(self._default.config).set_timesteps(4)
        except Exception:
            return False
        return True


class _HostTimesteps:
    """Has a scheduler compute with a copy of its time steps in CPU memory.

    Pipelines keep the time steps on the GPU, where the denoiser needs them. Schedulers look up
    their tables, which are in CPU memory, by these time steps: each look-up would have the host
    wait for the GPU, up to fourteen times per step and image. The copy is made once per image.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._source: torch.Tensor | None = None
        self._copy = torch.empty(0)
        for name in ("scale_model_input", "step"):
            if (method := getattr(scheduler, name, None)) is not None:
                setattr(scheduler, name, self._with_copy(method))

    def _with_copy(self, method: Callable[..., Any]) -> Callable[..., Any]:
        # Pipelines inspect the signature of `step`.
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            source = self._scheduler.timesteps
            if source.device.type == "cpu":
                return method(*args, **kwargs)
            if source is not self._source:
                self._source, self._copy = source, source.cpu()
            self._scheduler.timesteps = self._copy
            try:
                return method(
                    *(self._of_copy(value) for value in args),
                    **{name: self._of_copy(value) for name, value in kwargs.items()},
                )
            finally:
                self._scheduler.timesteps = source

        return call

    def _of_copy(self, value: Any) -> Any:
        """The element of the copy if `value` is an element of the original, else `value`."""
        source = self._source
        if source is None or not isinstance(value, torch.Tensor) or value.ndim:
            return value
        if value._base is None or value._base is not (
            source if source._base is None else source._base
        ):
            return value
        return self._copy[(value.storage_offset() - source.storage_offset()) // source.stride(0)]
