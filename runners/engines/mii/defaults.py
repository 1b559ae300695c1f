"""The sampling defaults of `mii.generate`, over those of the model's generation config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from runners.config.mii import GenerateSection
from runners.hf.models import SamplingDefaults, sampling_defaults


def mii_defaults(
    generate: GenerateSection, generation: GenerationConfig | None
) -> SamplingDefaults:
    """What `generate` sets, else the generation config's; `do_sample: false` is greedy."""
    values: dict[str, Any] = {
        "temperature": _temperature(generate),
        "top_p": generate.top_p,
        "top_k": generate.top_k,
    }
    return replace(
        sampling_defaults(generation),
        min_new_tokens=generate.min_new_tokens,
        stop=tuple(generate.stop),
        ignore_eos=generate.ignore_eos,
        **{name: value for name, value in values.items() if value is not None},
    )


def _temperature(generate: GenerateSection) -> float | None:
    """None where the section does not say, and the generation config decides."""
    if generate.do_sample is False:
        return 0.0
    if generate.do_sample and generate.temperature is None:
        return 1.0
    return generate.temperature
