"""Converting pickled checkpoints: the weights stay the same, and no code runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import bentoml
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from model_store_scripts.importing import ImportRequest, import_model
from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel
from tests.support.model_store import copy, edit_json, is_empty, pickled, write_pipeline
from tests.support.models import write_model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output layer is its input embedding."""
    return write_model("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def folder(gpt2: Path, tmp_path: Path) -> Path:
    """The same without weights."""
    target = copy(gpt2, tmp_path / "model")
    (target / "model.safetensors").unlink()
    return target


def converted(folder: Path) -> Path:
    import_model(ImportRequest(str(folder), "converted", convert_checkpoints=True))
    return Path(bentoml.models.get("converted").path, "model")


def assert_refused(folder: Path, store: Path, cls: type[ConfigError], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        converted(folder)
    assert type(error.value) is cls, error.value
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert is_empty(store)


def same_logits(one: Path, other: Path) -> bool:
    ids = torch.tensor([[5, 9, 2]])
    a, b = (tf.AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (one, other))
    return torch.equal(a, b)


def test_tied_weights(gpt2: Path, folder: Path, store: Path) -> None:
    state = tf.AutoModelForCausalLM.from_pretrained(gpt2).state_dict()
    tied = state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert tied, "this test is about tensors that share memory"
    torch.save(state, folder / "pytorch_model.bin")
    served = converted(folder)
    assert same_logits(gpt2, served)
    assert {f.name for f in served.glob("*model*")} == {"model.safetensors"}
    again = import_model(ImportRequest(str(folder), "converted", convert_checkpoints=True))
    assert not again.new


def test_shards(gpt2: Path, folder: Path, store: Path) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    names = sorted(tensors)
    halves = {
        "pytorch_model-00001-of-00002.bin": names[:9],
        "pytorch_model-00002-of-00002.bin": names[9:],
    }
    for file, part in halves.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    served = converted(folder)
    assert same_logits(gpt2, served)

    weight_map = {name: file for file, part in halves.items() for name in part}
    edit_json(folder / "pytorch_model.bin.index.json", weight_map=weight_map)
    assert same_logits(gpt2, converted(folder))
    assert len(bentoml.models.list("converted")) == 1, "with and without an index, the same model"
    index = json.loads((served / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"].values()) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert not list(served.glob("*.bin*"))


def test_awkward_tensors_and_wrappers(gpt2: Path, folder: Path, store: Path) -> None:
    tensors: dict[str, Any] = dict(load_file(gpt2 / "model.safetensors"))
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    assert not tensors[name].is_contiguous()
    name = "transformer.wpe.weight"
    tensors[name] = torch.nn.Parameter(torch.cat([tensors[name], tensors[name]])[:512])
    torch.save({"epoch": 3, "state_dict": tensors}, folder / "checkpoint.pt")
    (folder / "training_args.bin").write_bytes(b"left by the trainer")
    assert same_logits(gpt2, converted(folder))


def test_the_format_before_zip(gpt2: Path, folder: Path, store: Path) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same_logits(gpt2, converted(folder))


def test_safetensors_take_precedence(gpt2: Path, store: Path, tmp_path: Path) -> None:
    both = copy(gpt2, tmp_path / "both")
    (both / "pytorch_model.bin").write_bytes(b"never read")
    imported = import_model(ImportRequest(str(both), "both", convert_checkpoints=True))
    assert imported.notes == ("left out: pytorch_model.bin",)


def test_a_pipeline(store: Path, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    before = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save(before, folder / "vae" / "diffusion_pytorch_model.bin")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    pickled(folder / "text_encoder")
    served = converted(folder)
    after = load_file(served / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(before["weight"], after["weight"])
    assert (served / "text_encoder" / "model.safetensors").is_file()


class Payload:
    """A pickle that makes a call when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_not_run(zipped: bool, folder: Path, store: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = {"a": torch.zeros(2), "b": Payload(marker)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_refused(folder, store, UnsafeModel, "pytorch_model.bin contains more than weights")
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the payload is live"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_code(folder: Path, store: Path) -> None:
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.zeros(1, 2))
    traced.save(str(folder / "model.pt"))
    assert_refused(folder, store, UnsafeModel, "model.pt is TorchScript")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "pytorch_model.bin cannot be read as a checkpoint"),
        (b"PK\x03\x04 and no more", "pytorch_model.bin cannot be read as a checkpoint"),
        (b"\x80\x02.", "pytorch_model.bin cannot be read as a checkpoint"),
        (b"\x80\x02X\x01", "pytorch_model.bin cannot be read as a checkpoint"),
        ([torch.zeros(2)], "pytorch_model.bin is not a checkpoint of named tensors"),
        ({}, "pytorch_model.bin is not a checkpoint of named tensors"),
        ({"a": torch.zeros(2), "b": 3}, "not a checkpoint of named tensors: see 'b'"),
        ({"a": torch.zeros(2).to_sparse()}, "not a checkpoint of named tensors: see 'a'"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "cannot be written as safetensors"),
    ],
)
def test_invalid_checkpoints(content: Any, message: str, folder: Path, store: Path) -> None:
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    assert_refused(folder, store, ConfigError, message)


def test_ambiguous_pickles(folder: Path, store: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"a": torch.zeros(2)}, folder / name)
    assert_refused(folder, store, ConfigError, "which of a.pt, b.pt are the weights?")


def test_a_missing_shard(folder: Path, store: Path) -> None:
    index = "pytorch_model.bin.index.json"
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model-00001-of-00002.bin")
    edit_json(folder / index, weight_map={"a": "pytorch_model-00002-of-00002.bin"})
    message = f"pytorch_model-00002-of-00002.bin is missing, which {index} lists"
    assert_refused(folder, store, IncompleteModel, message)
