"""TorchServe's DeepSpeed example as it was published, for any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL_CONFIG = """\
# TorchServe frontend parameters
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 100
responseTimeout: 120
parallelType: "tp"
deviceType: "gpu"
deviceIds: [0,1,2,3] # those that CUDA_VISIBLE_DEVICES names

torchrun:
    nproc-per-node: 2

# TorchServe backend parameters
deepspeed:
    config: ds-config.json
    checkpoint: checkpoints.json

handler:
    model_name: "facebook/opt-30b"
    model_path: "checkpoints"
    max_length: 80
    max_new_tokens: 50
    manual_seed: 40
"""

MII_MODEL_CONFIG = """\
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 100
responseTimeout: 1200
parallelType: "tp"
deviceType: "gpu"
deviceIds: [0,1,2,3]

torchrun:
    nproc-per-node: 4

handler:
    model_name: "meta-llama/Llama-2-13b-hf"
    model_path: "model/models--meta-llama--Llama-2-13b-hf/snapshots/99afe33d"
    tensor_parallel: 4
    max_length: 4096
    max_new_tokens: 256
"""
"""That of the MII example for text, whose handler gives the two former numbers to MII."""

DS_CONFIG: dict[str, Any] = {
    "dtype": "torch.float16",
    "replace_with_kernel_inject": True,
    "tensor_parallel": {"tp_size": 2},
}


def published(folder: Path, **ds_config: object) -> Path:
    """`model-config.yaml` and `ds-config.json` in a folder; the model is to be in `checkpoints/`.

    `ds_config` are keys more than the published ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-config.yaml").write_text(MODEL_CONFIG)
    (folder / "ds-config.json").write_text(json.dumps(DS_CONFIG | ds_config))
    return folder


def edit(folder: Path, old: str, new: str) -> None:
    """Replace a piece of `model-config.yaml`, which has to be there once."""
    path = folder / "model-config.yaml"
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
