"""Schedulers by their usual names, as far as they are compatible with a pipeline.

Used by the image program and its generator, in rank processes.
"""

from __future__ import annotations

from typing import Any

import diffusers

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
        return cls.from_config(self._default.config)

    def _is_usable(self, cls: Any) -> bool:
        # Some need packages that are not installed, some reject another scheduler's config.
        try:
            cls.from_config(self._default.config).set_timesteps(4)
        except Exception:
            return False
        return True
