"""Converts pickled PyTorch checkpoints to safetensors without running code in them.

Called by `importing`, which imports this module only for pickles: it imports torch.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model_store_scripts.layout import Pickles
from model_store_scripts.progress import progress_bar
from runners.contracts.errors import ConfigError, UnsafeModel, reraise_as

WRAPPERS = ("state_dict", "model_state_dict", "module", "model")
"""Keys of the weights in checkpoints that contain more than weights."""


def convert(checkpoints: list[Pickles], root: Path, target: Path) -> list[str]:
    """Write the weights into `target` as safetensors; returns the names of the new files.

    Tensors that share memory in the checkpoint are each written in full: safetensors has no
    aliases, and loading ties those that the model's configuration ties.

    Raises: UnsafeModel (a pickle with more than data in it), ConfigError (not a checkpoint).
    """
    names = []
    count = sum(len(p.files) for p in checkpoints)
    with progress_bar(count, "file", "converting") as bar:
        for checkpoint in checkpoints:
            weight_map: dict[str, str] = {}
            size = 0
            for number, name in enumerate(checkpoint.files, start=1):
                tensors = _load(root / name, name)
                new_name = _new_name(checkpoint, number)
                _save(tensors, target / new_name, name)
                weight_map |= dict.fromkeys(tensors, Path(new_name).name)
                size += sum(t.numel() * t.element_size() for t in tensors.values())
                names.append(new_name)
                bar.update()
            if len(checkpoint.files) > 1:
                names.append(_write_index(checkpoint, target, weight_map, size))
    return names


def _new_name(checkpoint: Pickles, number: int) -> str:
    count = len(checkpoint.files)
    shard = f"-{number:05}-of-{count:05}" if count > 1 else ""
    return checkpoint.part.path(f"{checkpoint.part.weights}{shard}.safetensors")


def _load(path: Path, name: str) -> dict[str, torch.Tensor]:
    with reraise_as(ConfigError, f"{name} cannot be read as a checkpoint"):
        content = _unpickle(path, name)
    return _tensors(content, name)


def _unpickle(path: Path, name: str) -> Any:
    can_map = zipfile.is_zipfile(path)  # files from before torch 1.6 are not zip files
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch refuses what it warns about
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except pickle.UnpicklingError:
        raise UnsafeModel(
            f"{name} contains more than weights, or is not a checkpoint: refused"
        ) from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise UnsafeModel(f"{name} is TorchScript, which is code") from None
        raise


def _tensors(content: Any, name: str) -> dict[str, torch.Tensor]:
    if isinstance(content, dict):
        content = next((content[w] for w in WRAPPERS if isinstance(content.get(w), dict)), content)
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{name} is not a checkpoint of named tensors")
    for key, value in content.items():
        is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not is_dense:
            raise ConfigError(f"{name} is not a checkpoint of named tensors: see {key!r}")
    return content


def _save(tensors: dict[str, torch.Tensor], path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    addresses: set[int] = set()
    for key, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.detach().clone() if address in addresses else tensor.detach()
        tensors[key] = tensors[key].contiguous()
        addresses.add(address)
    try:
        # transformers reads the framework from this entry.
        save_file(tensors, path, metadata={"format": "pt"})
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{name} cannot be written as safetensors: {error}") from None


def _write_index(checkpoint: Pickles, target: Path, weight_map: dict[str, str], size: int) -> str:
    name = checkpoint.part.path(f"{checkpoint.part.weights}.safetensors.index.json")
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (target / name).write_text(json.dumps(index, indent=2) + "\n")
    return name
