"""A BentoML model store for one test, and model folders to import into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.models import ModelStore
from safetensors.torch import save_file


@contextmanager
def store_at(home: Path) -> Iterator[Path]:
    """Use a BentoML store in `home` in this process; yields the folder of its models."""
    (home / "tmp").mkdir(parents=True)
    (home / "models").mkdir()
    providers = {
        BentoMLContainer.bentoml_home: str(home),
        BentoMLContainer.model_store_dir: str(home / "models"),
        BentoMLContainer.tmp_bento_store_dir: str(home / "tmp"),
        BentoMLContainer.model_store: ModelStore(home / "models"),
    }
    for provider, value in providers.items():
        provider.set(value)
    try:
        yield home / "models"
    finally:
        for provider in providers:
            provider.reset()


def is_empty(models: Path) -> bool:
    """Whether the store and its temporary folder are both empty."""
    return not any(models.iterdir()) and not any((models.parent / "tmp").iterdir())


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, which is created if it does not exist."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def pickled(folder: Path, shards: int = 1) -> Path:
    """Turn a model's single safetensors file into `pytorch_model.bin`, or shards with an index."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = names[i::shards]
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    edit_json(folder / "pytorch_model.bin.index.json", weight_map=weight_map)
    return folder


def write_pipeline(folder: Path) -> Path:
    """A text-to-image folder in the layout of diffusers, with tiny weights."""
    components = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": [None, None],
    }
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    edit_json(folder / "model_index.json", **index, **components)
    for name in ("unet", "vae", "text_encoder"):
        (folder / name).mkdir()
        edit_json(folder / name / "config.json", sample_size=8)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file({"weight": torch.ones(3, 5).half()}, folder / name / f"{stem}.safetensors")
    for name, file in (
        ("tokenizer", "vocab.json"),
        ("scheduler", "scheduler_config.json"),
        ("feature_extractor", "preprocessor_config.json"),
    ):
        (folder / name).mkdir()
        edit_json(folder / name / file, a=1)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return folder


def copy(folder: Path, target: Path) -> Path:
    """A copy of a model folder, to be changed."""
    shutil.copytree(folder, target)
    return target
