"""Importing folders: what ends up in the store, repeats, configurations, and clean failures."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import pytest
import transformers as tf

from model_store_scripts import copying, import_model
from model_store_scripts.importing import ImportRequest
from model_store_scripts.importing import import_model as run_import
from model_store_scripts.list_models import main as list_models
from runners.config import load_setup_config
from runners.errors import ConfigError
from tests.support.model_store import copy, edit_json, is_empty, store_at, write_pipeline
from tests.support.models import write_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    with store_at(tmp_path / "home") as models:
        yield models


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


def test_the_same_again_is_taken_once(
    llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_import(ImportRequest(str(llama), "tiny"))
    other_config = run_import(ImportRequest(str(llama), "tiny", overrides={"max_length": 9}))
    assert first.new
    assert other_config.new
    assert str(bentoml.models.get("tiny").tag) == other_config.tag

    again = run_import(ImportRequest(str(llama), "tiny"))
    assert (again.tag, again.new) == (first.tag, False)
    assert str(bentoml.models.get("tiny").tag) == first.tag, "the bare name means the last import"
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
    assert "unknown key device_map is ignored" in " ".join(run_import(request).notes)
    config, _ = load_setup_config(Path(bentoml.models.get("served").path), name="served")
    assert (config.engine, config.world_size) == ("deepspeed", 2)
    assert (config.max_length, config.dtype) == (7, "bfloat16")


def test_only_what_belongs_to_the_model_is_taken(llama: Path, store: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "cluttered")
    # BentoML would unpickle this one if it came to lie where BentoML looks for it.
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
    taken = {f.name for f in Path(bentoml.models.get("tidy").path, "model").iterdir()}
    assert taken == {f.name for f in llama.iterdir()} | {"LICENSE", "linked.json"}
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
    assert cli(folder, "--name", "painter") == 0
    model = bentoml.models.get("painter")
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


def test_wrong_values_and_the_wrong_task_are_refused(
    llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, said in (
        (("--max-length", "0"), "max_length: Input should be greater than or equal to 1"),
        (("--tensor-parallel", "2"), "tensor_parallel: Input should be 1"),
        (("--task", "text-to-image"), "the model is for text-generation, not for text-to-image"),
        (("--setup-config", tmp_path / "none.json"), "none.json does not exist"),
        (("--revision", "main"), "is a folder here and has no revisions"),
    ):
        assert cli(llama, "--name", "tiny", *wrong) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert said in err
        assert err.count("\n") == 1
    assert is_empty(store)


@pytest.mark.parametrize(
    "usage",
    [
        ("--name", "Not A Name"),
        ("--name", "tiny:v1"),
        ("--name", "a" * 64),
        ("--name", "../../etc"),
        ("--name", "tiny", "--max-memory", "10GB"),
        ("--name", "tiny", "--device-map", "{"),
        ("--name", "tiny", "--engine", "vllm"),
        ("--name", "tiny", "--trust-remote-code"),
        ("--nam", "tiny"),
        (),
    ],
)
def test_bad_usage(usage: tuple[str, ...], llama: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli(llama, *usage)
    assert stop.value.code == 2


def test_a_bad_name_is_refused_without_the_command_too(llama: Path) -> None:
    with pytest.raises(ConfigError, match="'Not A Name' is not a model name"):
        run_import(ImportRequest(str(llama), "Not A Name"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_a_copy_that_breaks_off_leaves_nothing(
    error: Any,
    llama: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: int) -> None:
            assert any((store.parent / "tmp").rglob("config.json")), "something was copied"
            raise error

    monkeypatch.setattr(copying, "progress_bar", lambda *_: Bar())
    assert cli(llama, "--name", "tiny") == (130 if error is KeyboardInterrupt else 1)
    assert capsys.readouterr().err.count("\n") == 1
    assert is_empty(store)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "bad disk")])
def test_the_store_has_all_or_nothing(
    error: Any,
    llama: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr("shutil.copytree", fail)
    assert cli(llama, "--name", "tiny") == (130 if error is KeyboardInterrupt else 1)
    said = "interrupted" if error is KeyboardInterrupt else "error: the model store refuses tiny:"
    assert capsys.readouterr().err.startswith(said)
    assert is_empty(store)


def test_a_store_on_a_disk_of_its_own(
    llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", other_disk)
    imported = run_import(ImportRequest(str(llama), "tiny"))
    tf.AutoConfig.from_pretrained(Path(bentoml.models.get(imported.tag).path, "model"))
    assert not any((store.parent / "tmp").iterdir())


def test_a_full_disk_is_seen_before_copying(
    llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match="has room for 1,000"):
        run_import(ImportRequest(str(llama), "tiny"))
    assert is_empty(store)


def test_a_killed_import_is_swept_up_by_the_next(llama: Path, tmp_path: Path) -> None:
    big = copy(llama, tmp_path / "big")
    size = 1 << 30
    tensor = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    header = json.dumps(tensor).encode()
    with (big / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    home = tmp_path / "home"
    command = [sys.executable, "-m", "model_store_scripts.import_model", str(big), "--name", "big"]
    env = os.environ | {"BENTOML_HOME": str(home)}
    for sent, code, left in ((signal.SIGTERM, 130, False), (signal.SIGKILL, -9, True)):
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while not any((home / "tmp").glob("*/item/model/model.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(sent)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        assert any((home / "tmp").iterdir()) is left
        assert not any((home / "models").iterdir())
    tiny = [*command[:3], str(llama), "--name", "tiny"]
    done = subprocess.run(tiny, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not any((home / "tmp").iterdir())
