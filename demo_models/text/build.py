"""Writes the demo text model as a complete Hugging Face model folder, without training.

Called by `model_store_scripts.make_demo_models` and the tests.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save

WEIGHTS = Path(__file__).parent / "weights"
_TENSORS = "model.safetensors"


def write_demo_text_model(target: Path) -> Path:
    """Writes the model to the folder `target`, creating it, and returns the folder.

    The repository has the weights in half precision to be small; the folder has them in float32, so
    that every engine computes with the same numbers.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in WEIGHTS.iterdir():
        shutil.copyfile(file, target / file.name)
    weights = {name: half.float() for name, half in load_file(WEIGHTS / _TENSORS).items()}
    # `save_file` would make a file that only its owner may read.
    (target / _TENSORS).write_bytes(save(weights, metadata={"format": "pt"}))
    config = json.loads((WEIGHTS / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    return target
