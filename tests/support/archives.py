"""TorchServe archives, made by torch-model-archiver with the configurations of its examples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.torchserve import MII_MODEL_CONFIG, published

ACCELERATE = {
    "revision": "main",
    "max_memory": {"0": "10GiB", "1": "10GiB", "cpu": "30GiB"},
    "low_cpu_mem_usage": True,
    "device_map": "auto",
    "offload_folder": "offload",
    "offload_state_dict": True,
    "torch_dtype": "float16",
    "max_length": 50,
}
"""`setup_config.json` of the Accelerate example."""
ACCELERATE_MODEL_CONFIG = """\
minWorkers: 1
maxWorkers: 1
responseTimeout: 300
deviceType: "gpu"
parallelType: "custom"
"""
MII = {"model_name": "stabilityai/stable-diffusion-2-1", "task": "text-to-image"}
"""`setup_config.json` of the MII example."""
MII_OF_THE_REPOSITORY = {
    "task_name": "text-to-image",
    "provider": "diffuser",
    "ds_optimize": False,
    "ds_zero": False,
    "mii_config": {"tensor_parallel": 1, "dtype": "fp32"},
    "model_config": {"guidance_scale": 4.0, "num_inference_steps": 3},
}
"""The same in the form of the examples in pytorch/serve, with other numbers."""
HANDLER = "raise SystemExit('an archive\\'s handler was run')\n"
HANDLER += "".join(
    f"# line {number} of 164, the length of the longest example\n" for number in range(2, 165)
)
REQUIREMENTS = "transformers==4.33.1\n"


def archive(
    folder: Path, model_name: str, extra_files: list[Path], *options: str, version: str = "1.0"
) -> Path:
    """Run `torch-model-archiver` as its examples do; returns the archive, which is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "custom_handler.py").write_text(HANDLER)
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "made").mkdir()
    archiver = str(Path(sys.executable).with_name("torch-model-archiver"))
    command = [archiver, "--model-name", model_name]
    command += ["--version", version, "--handler", "custom_handler.py", "-r", "requirements.txt"]
    extra = ["--extra-files", ",".join(map(str, extra_files))] if extra_files else []
    command += [*extra, "--export-path", "made"]
    # It uses a temporary folder named after the model.
    env = os.environ | {"TMPDIR": str(folder / "tmp")}
    subprocess.run([*command, *options], cwd=folder, env=env, check=True)
    [path] = (folder / "made").iterdir()
    return path


def zip_of(model: Path, path: Path) -> Path:
    """`zip -r model.zip *` in the model's folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(model.rglob("*")):
            packed.write(file, file.relative_to(model))
    return path


def accelerate_archive(folder: Path, model: Path, *options: str, name: str = "bloom") -> Path:
    """`model.zip`, `setup_config.json` and `model-config.yaml`, in a `.tar.gz` by default."""
    folder.mkdir(parents=True)
    setup = folder / "setup_config.json"
    setup.write_text(json.dumps(ACCELERATE))
    (folder / "model-config.yaml").write_text(ACCELERATE_MODEL_CONFIG)
    files = [zip_of(model, folder / "model.zip"), setup]
    options = options or ("--archive-format", "tgz")
    return archive(folder, name, files, "--config-file", "model-config.yaml", *options)


def deepspeed_archive(folder: Path, model: Path | None, *options: str, name: str = "opt") -> Path:
    """The weights' folder, `ds-config.json` and `model-config.yaml`, in a `.tar.gz` by default."""
    published(folder)
    files = [*([model] if model else []), folder / "ds-config.json"]
    options = options or ("--archive-format", "tgz")
    return archive(folder, name, files, "--config-file", "model-config.yaml", *options)


def mii_text_archive(folder: Path, model: Path) -> Path:
    """`model-config.yaml` in a folder, with the model as in the cache of the hub's client."""
    folder.mkdir(parents=True)
    (folder / "model-config.yaml").write_text(MII_MODEL_CONFIG)
    options = ("--config-file", "model-config.yaml", "--archive-format", "no-archive")
    path = archive(folder, "mii-llm", [], *options)
    snapshot = path / "model/models--meta-llama--Llama-2-13b-hf/snapshots/99afe33d"
    shutil.copytree(model, snapshot)
    return path


def mii_archive(folder: Path, model: Path, setup_config: Mapping[str, object] = MII) -> Path:
    """`model.zip` and `setup_config.json` in a `.mar`."""
    folder.mkdir(parents=True)
    setup = folder / "setup_config.json"
    setup.write_text(json.dumps(setup_config))
    return archive(folder, "stable-diffusion", [zip_of(model, folder / "model.zip"), setup])
