"""Importing folders: what is in the store afterwards, repeated imports, configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bentoml
import pytest
import transformers as tf

from model_store_scripts import import_model
from model_store_scripts.importing import ImportRequest
from model_store_scripts.importing import import_model as run_import
from model_store_scripts.list_models import main as list_models
from runners.config.files import load_setup_config
from tests.support.model_store import copy, edit_json, write_pipeline


def cli(*argv: str | Path) -> int:
    return import_model.main([str(a) for a in argv])


def test_a_folder_is_served_from_the_store(
    llama: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(llama, "--name", "tiny", "--max-length", "9", "--max-memory", '{"0": "1GiB"}') == 0
    out = capsys.readouterr().out.splitlines()
    model = bentoml.models.get("tiny")
    assert out[0].startswith(
        f"{model.tag}  imported: LlamaForCausalLM, 152,000 parameters, float32"
    )
    assert out[1] == f"serve it with: TRIPTYCH_TEXT_MODEL={model.tag} bentoml serve ."
    config: Any
    config, warnings = load_setup_config(Path(model.path), name="tiny")
    assert (config.engine, config.max_length, warnings) == ("accelerate", 9, [])
    assert config.model_dump()["max_memory"] == {0: "1GiB"}
    served = config.model_path
    assert tf.AutoTokenizer.from_pretrained(served)("the cat").input_ids
    loaded = tf.AutoModelForCausalLM.from_pretrained(served)
    about = model.info.metadata
    assert about["parameters"] == loaded.num_parameters()
    assert about["total_bytes"] == sum(f.stat().st_size for f in served.rglob("*"))
    assert about["source"] == str(llama)
    assert model.info.labels == {"task": "text-generation", "engine": "accelerate"}
    assert not any((store.parent / "tmp").iterdir())


def test_the_same_model_is_imported_once(
    llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_import(ImportRequest(str(llama), "tiny"))
    other_config = run_import(ImportRequest(str(llama), "tiny", overrides={"max_length": 9}))
    assert first.new
    assert other_config.new
    assert str(bentoml.models.get("tiny").tag) == other_config.tag

    again = run_import(ImportRequest(str(llama), "tiny"))
    assert (again.tag, again.new) == (first.tag, False)
    assert str(bentoml.models.get("tiny").tag) == first.tag, "the name alone means the last import"
    assert cli(llama, "--name", "tiny") == 0
    assert "already in the store, unchanged" in capsys.readouterr().out

    changed = copy(llama, tmp_path / "changed")
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    assert run_import(ImportRequest(str(changed), "tiny")).new
    assert len(bentoml.models.list("tiny")) == 3
    list_models()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_torchserve_folder_with_its_published_config(
    llama: Path, store: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mar"
    copy(llama, folder / "model")
    (folder / "custom_handler.py").write_text("")
    published = {
        "revision": "main",
        "max_memory": {"0": "10GB", "cpu": "10GB"},
        "low_cpu_mem_usage": True,
        "device_map": "auto",
        "offload_folder": "offload",
        "offload_state_dict": True,
        "torch_dtype": "float16",
        "max_length": "50",
    }
    edit_json(folder / "setup_config.json", **published)
    imported = run_import(ImportRequest(str(folder), "served"))
    notes = " ".join(imported.notes)
    assert "low_cpu_mem_usage" in notes
    assert "left out: custom_handler.py" in notes
    item = Path(bentoml.models.get("served").path)
    assert json.loads((item / "setup_config.json").read_text()) == {
        "engine": "accelerate",
        "task": "text-generation",
        "revision": "main",
        "max_memory": {"0": "10GB", "cpu": "10GB"},
        "device_map": "auto",
        "offload_folder": "offload",
        "dtype": "float16",
        "max_length": 50,
    }

    other = tmp_path / "other.json"
    edit_json(other, max_length=7, torch_dtype="bfloat16", device_map="auto")
    request = ImportRequest(
        str(folder), "served", {"engine": "deepspeed", "tensor_parallel": 2}, setup_config=other
    )
    assert "device_map is ignored: it is for engine accelerate, not deepspeed" in " ".join(
        run_import(request).notes
    )
    config: Any
    config, _ = load_setup_config(Path(bentoml.models.get("served").path), name="served")
    assert (config.engine, config.world_size) == ("deepspeed", 2)
    assert (config.max_length, config.dtype) == (7, "bfloat16")


def test_only_files_of_the_model_are_imported(llama: Path, store: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "cluttered")
    # BentoML would unpickle custom_objects.pkl if it were in the top folder of its item.
    left_out = ["custom_objects.pkl", "model.yaml", "model.onnx", "pytorch_model.bin"]
    left_out += ["training_args.bin", "adapter_config.json", "model.safetensors.index.json"]
    for name in left_out:
        (folder / name).write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "hook.py").write_text("")
    (folder / "LICENSE").write_text("do what you like")
    (folder / "extra").mkdir()
    (folder / "extra" / "tokenizer.json").write_text("{}")
    (folder / "linked.json").symlink_to("config.json")
    imported = run_import(ImportRequest(str(folder), "tidy"))
    names = {f.name for f in Path(bentoml.models.get("tidy").path, "model").iterdir()}
    assert names == {f.name for f in llama.iterdir()} | {"LICENSE", "linked.json"}
    [note] = imported.notes
    assert note.startswith(
        "left out: adapter_config.json, custom_objects.pkl, extra/tokenizer.json"
    )
    assert note.endswith("and 3 more")


def test_sharded_weights(llama: Path, store: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "sharded")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    imported = run_import(ImportRequest(str(folder), "sharded"))
    assert imported.metadata["parameters"] == model.num_parameters()
    assert imported.notes == ()
    served = Path(bentoml.models.get("sharded").path, "model")
    assert len(list(served.glob("*.safetensors"))) > 1
    tf.AutoModelForCausalLM.from_pretrained(served)


def test_a_text_to_image_folder(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("")
    assert cli(folder, "--name", "image") == 0
    model = bentoml.models.get("image")
    assert f"TRIPTYCH_IMAGE_MODEL={model.tag}" in capsys.readouterr().out
    about = model.info.metadata
    assert about["architecture"] == "StableDiffusionPipeline"
    assert (about["task"], about["parameters"], about["dtype"]) == ("text-to-image", 45, "float16")
    assert load_setup_config(Path(model.path), name="p")[0].task == "text-to-image"
    unet = Path(model.path, "model", "unet")
    assert {f.name for f in unet.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
