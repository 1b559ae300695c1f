"""Schedulers by their usual names, as far as they fit a pipeline."""

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
    """The schedulers a pipeline can be run with."""

    def __init__(self, own: Any) -> None:
        self._own = own
        compatible = {type(own).__name__} | {cls.__name__ for cls in own.compatibles}
        self.names = [
            name
            for name, kind in NAMES.items()
            if kind == type(own).__name__
            or (kind in compatible and self._works(getattr(diffusers, kind)))
        ]

    @property
    def default(self) -> str:
        """The name of the pipeline's own; empty if it has none here."""
        kind = type(self._own).__name__
        return next((name for name, known in NAMES.items() if known == kind), "")

    def make(self, name: str | None) -> Any:
        """A new scheduler, which keeps the state of one picture, set up as the pipeline's own."""
        kind = getattr(diffusers, NAMES[name]) if name else type(self._own)
        return kind.from_config(self._own.config)

    def _works(self, kind: Any) -> bool:
        # Some need packages that are not there, some refuse what another is set up with.
        try:
            kind.from_config(self._own.config).set_timesteps(4)
        except Exception:
            return False
        return True
