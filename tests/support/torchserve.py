"""TorchServe's DeepSpeed example as it was published, for any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL_CONFIG = """\
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 100
responseTimeout: 120
parallelType: "tp"
deviceType: "gpu"
torchrun:
    nproc-per-node: 2
deepspeed:
    config: ds-config.json
handler:
    model_name: "facebook/opt-30b"
    model_path: "checkpoints"
    max_length: 80
    max_new_tokens: 50
    manual_seed: 40
"""

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
