"""Writes the demo image model as a complete diffusers pipeline folder, without training.

Called by `model_store_scripts.make_demo_models`, the benchmarks and the tests.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from demo_models.image.components import new_scheduler

WEIGHTS = Path(__file__).parent / "weights"


def assemble(autoencoder: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> Any:
    """The components as one `StableDiffusionPipeline`."""
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

    The weights are stored in half precision, which loses nothing visible, and computed in float32,
    as diffusers does by default, so that every engine computes with the same numbers.
    """
    # `copyfile` copies no permissions: the repository's files may be readable by their owner only.
    shutil.copytree(WEIGHTS, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    text_encoder = json.loads((target / "text_encoder/config.json").read_text())
    _write(target / "text_encoder/config.json", text_encoder | {"dtype": "float32"})
    _write(target / "setup_config.json", {"task": "text-to-image", "dtype": "float32"})
    return target


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n")
