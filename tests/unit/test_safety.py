"""The rule about code in a model folder, which imports and ranks share."""

from __future__ import annotations

from typing import Any

import pytest

from runners.contracts.errors import UnsafeModel
from runners.hf.safety import refuse_code, refuse_foreign_components

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": [None, None],
}


def test_a_model_without_code_passes() -> None:
    refuse_code(["config.json", "model.safetensors", "py", "merges.txt"])
    refuse_foreign_components(INDEX, "model_index.json")


@pytest.mark.parametrize("name", ["a.py", "unet/b.PYC", "c.so", "d/e.dll", ".git/f.dylib"])
def test_code_is_refused_wherever_it_is(name: str) -> None:
    with pytest.raises(UnsafeModel, match=f"^{name} is code"):
        refuse_code(["config.json", name])


@pytest.mark.parametrize(
    "component", [["os", "system"], ["diffusers", "a.b"], ["diffusers"], [], ["diffusers", "A", 1]]
)
def test_a_component_of_another_library_is_refused(component: Any) -> None:
    with pytest.raises(UnsafeModel, match=r"^index takes unet from .* neither diffusers nor"):
        refuse_foreign_components(INDEX | {"unet": component}, "index")
