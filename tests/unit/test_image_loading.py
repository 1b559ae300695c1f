"""Which folders are loaded as pipelines, which weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runners.config.files import load_setup_config
from runners.contracts.errors import ConfigError, IncompleteModel
from runners.engines.images import load_program
from runners.images.pipeline import load_pipeline
from runners.rank.program import RankContext
from tests.support.image_models import write_image_model

WEIGHTS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model("stable-diffusion", tmp_path_factory.mktemp("images") / "tiny-sd")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "odd")


def load(folder: Path, options: dict[str, object] | None = None, *, on_cpu: bool = True) -> Any:
    config: Any = load_setup_config(folder, name="odd")[0]
    return load_pipeline(config, on_cpu=on_cpu, options=options)


@pytest.mark.parametrize(
    ("index", "file", "reason"),
    [
        ({}, "unet/pipeline.py", "is code"),
        ({"_class_name": ["pipeline", "Mine"]}, None, "would be code"),
        ({"unet": ["os", "system"]}, None, "neither diffusers nor"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, None, "from a prompt alone"),
        ({"_class_name": "NoSuchPipeline"}, None, "lacks"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, None, "image_encoder is missing"),
    ],
)
def test_a_folder_without_a_servable_pipeline_is_refused(
    folder: Path, index: dict[str, object], file: str | None, reason: str
) -> None:
    content = json.loads((folder / "model_index.json").read_text()) | index
    (folder / "model_index.json").write_text(json.dumps(content))
    if file is not None:
        (folder / file).write_text("raise SystemExit")
    with pytest.raises(ConfigError, match=reason):
        load(folder)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["placed later", "placed"])
@pytest.mark.parametrize("component", WEIGHTS)
def test_missing_weights_are_not_initialised_at_random(
    folder: Path, component: str, options: dict[str, object]
) -> None:
    file = folder / component / f"{WEIGHTS[component]}.safetensors"
    weights = load_file(file)
    missing = next(name for name in weights if name.endswith(("q_proj.weight", "conv_in.weight")))
    del weights[missing]
    save_file(weights, file)
    with pytest.raises(IncompleteModel, match=f"{component} lacks 1 of the weights .* {missing}"):
        load(folder, options)


def add_float16(folder: Path, *, alone: bool) -> None:
    """Add weights in float16 under the hub's names for them; `alone` removes the others."""
    for part, name in WEIGHTS.items():
        file = folder / part / f"{name}.safetensors"
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(halves, folder / part / f"{name}.fp16.safetensors")
        if alone:
            file.unlink()


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["placed later", "placed"])
def test_a_variant_is_loaded_where_there_is_nothing_else(
    folder: Path, options: dict[str, object]
) -> None:
    add_float16(folder, alone=True)
    assert load(folder, options, on_cpu=False).unet.dtype == torch.float16


def test_the_dtype_is_that_of_the_files_that_are_loaded(folder: Path) -> None:
    add_float16(folder, alone=False)
    assert load(folder, on_cpu=False).unet.dtype == torch.float32


@pytest.mark.parametrize("device", ["cuda:7", "cuda", "xpu"])
@pytest.mark.skipif(torch.accelerator.device_count() > 0, reason="this machine has such devices")
def test_a_device_that_does_not_exist_is_refused(folder: Path, device: str) -> None:
    config, _ = load_setup_config(folder, name="odd", overrides={"device_map": device})
    context = RankContext(
        config=config, rank=0, num_threads=1, work_dir=folder, emit=lambda _: None
    )
    with pytest.raises(ConfigError, match=f"{device} does not exist, this machine has 0"):
        load_program(context)
