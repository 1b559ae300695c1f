"""Pickled PyTorch checkpoints to safetensors, without running what a pickle may carry."""

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

# Under what name training frameworks keep the weights in a checkpoint that holds more.
WRAPPERS = ("state_dict", "model_state_dict", "module", "model")


def convert(pickles: list[Pickles], root: Path, target: Path) -> list[str]:
    """Write each part's weights into `target` as safetensors; returns the names of the new files.

    Tensors that share memory in the checkpoint are each written in full: safetensors holds no
    aliases, and which of them a model ties again is not for a converter to guess.

    Raises: UnsafeModel (a pickle with more than data in it), ConfigError (not a checkpoint).
    """
    written = []
    count = sum(len(p.files) for p in pickles)
    with progress_bar(count, "file", "converting") as bar:
        for part in pickles:
            weight_map: dict[str, str] = {}
            size = 0
            for number, name in enumerate(part.files, start=1):
                tensors = _load(root / name, name)
                new = _new_name(part, number)
                _save(tensors, target / new, name)
                weight_map |= dict.fromkeys(tensors, Path(new).name)
                size += sum(t.numel() * t.element_size() for t in tensors.values())
                written.append(new)
                bar.update()
            if len(part.files) > 1:
                written.append(_write_index(part, target, weight_map, size))
    return written


def _new_name(part: Pickles, number: int) -> str:
    count = len(part.files)
    shard = f"-{number:05}-of-{count:05}" if count > 1 else ""
    return part.part.path(f"{part.part.weights}{shard}.safetensors")


def _load(path: Path, name: str) -> dict[str, torch.Tensor]:
    with reraise_as(ConfigError, f"{name} can not be read as a checkpoint"):
        loaded = _unpickled(path, name)
    return _tensors(loaded, name)


def _unpickled(path: Path, name: str) -> Any:
    mapped = zipfile.is_zipfile(path)  # which those from before torch 1.6 are not
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UnsafeModel(f"{name} holds more than weights, or is no checkpoint: refused") from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise UnsafeModel(f"{name} is TorchScript, which is code") from None
        raise


def _tensors(loaded: Any, name: str) -> dict[str, torch.Tensor]:
    if isinstance(loaded, dict):
        loaded = next((loaded[w] for w in WRAPPERS if isinstance(loaded.get(w), dict)), loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise ConfigError(f"{name} is not a checkpoint of named tensors")
    for key, value in loaded.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not plain:
            raise ConfigError(f"{name} is not a checkpoint of named tensors: see {key!r}")
    return loaded


def _save(tensors: dict[str, torch.Tensor], path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.detach().clone() if memory in seen else tensor.detach()
        tensors[key] = tensors[key].contiguous()
        seen.add(memory)
    try:
        # transformers looks for this entry to know what wrote the file.
        save_file(tensors, path, metadata={"format": "pt"})
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{name} can not be written as safetensors: {error}") from None


def _write_index(part: Pickles, target: Path, weight_map: dict[str, str], size: int) -> str:
    name = part.part.path(f"{part.part.weights}.safetensors.index.json")
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (target / name).write_text(json.dumps(index, indent=2) + "\n")
    return name
