"""Writes the demo image model as a complete diffusers pipeline folder, without training."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save

from model_store_scripts.demo_image.parts import new_scheduler

WEIGHTS = Path(__file__).parent / "weights"


def assemble(autoencoder: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> Any:
    """The parts as one `StableDiffusionPipeline`."""
    return StableDiffusionPipeline(  # type: ignore[no-untyped-call]
        vae=autoencoder,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_demo_image_model(target: Path) -> Path:
    """Writes the pipeline to the folder `target`, creating it, and returns the folder.

    The repository holds the weights in half precision; the model itself is a float32 one, so that
    every engine computes with the same numbers.
    """
    shutil.copytree(WEIGHTS, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in target.glob("*/*.safetensors"):
        weights = {name: half.float() for name, half in load_file(path).items()}
        # Not `save_file`, which makes a file that its owner alone may read.
        path.write_bytes(save(weights, metadata={"format": "pt"}))
    path = target / "text_encoder" / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    return target
