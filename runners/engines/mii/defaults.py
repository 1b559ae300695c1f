"""The sampling defaults of a model on MII: those of `mii.generate`, else of its generation config.

For the ranks of both modes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from runners.config.mii import GenerateSection
from runners.hf.models import GENERATION, SamplingDefaults, loading, sampling_defaults


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config of a model folder, None if it has none. Raises: ConfigError."""
    if not (folder / GENERATION).is_file():
        return None
    with loading(GENERATION):
        return GenerationConfig.from_pretrained(folder)


def mii_defaults(
    generate: GenerateSection, generation: GenerationConfig | None
) -> SamplingDefaults:
    """What `generate` sets, else the generation config's; `do_sample: false` is temperature 0."""
    values: dict[str, Any] = {
        "stop": tuple(generate.stop) if generate.stop else None,
        "temperature": _temperature(generate),
        "top_p": generate.top_p,
        "top_k": generate.top_k,
    }
    return replace(
        sampling_defaults(generation),
        min_new_tokens=generate.min_new_tokens,
        ignore_eos=generate.ignore_eos,
        **{name: value for name, value in values.items() if value is not None},
    )


def _temperature(generate: GenerateSection) -> float | None:
    """None where the section leaves it to the generation config."""
    if generate.do_sample is False:
        return 0.0
    if generate.do_sample and generate.temperature is None:
        return 1.0
    return generate.temperature
