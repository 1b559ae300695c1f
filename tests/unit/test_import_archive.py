"""Importing archives of TorchServe: all of it is mapped or named in a note, none of it is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import pytest

from runners.config.deepspeed import without_tp_size
from tests.support.archives import (
    HANDLER,
    MII_OF_THE_REPOSITORY,
    accelerate_archive,
    deepspeed_archive,
    mii_archive,
    mii_text_archive,
)
from tests.support.image_models import write_image_model
from tests.support.importing import cli, refusal, stored_model
from tests.support.model_store import copy, edit_json, pickled, store_at, write_pipeline
from tests.support.torchserve import DS_CONFIG

NO_ARCHIVE = ("--archive-format", "no-archive")


@pytest.fixture(scope="module")
def bloom(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return accelerate_archive(tmp_path_factory.mktemp("accelerate") / "bloom", llama)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TorchServe's DeepSpeed example as published: the weights are in another folder."""
    return deepspeed_archive(tmp_path_factory.mktemp("deepspeed") / "opt", None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    with store_at(tmp_path / "home") as models:
        yield models
        assert not any((models.parent / "tmp").iterdir()), "unpacked files are deleted"


def files_of(model: Path) -> set[str]:
    return {path.relative_to(model).as_posix() for path in model.rglob("*.*")}


def test_accelerates_archive(
    bloom: Path, llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bloom.name == "bloom.tar.gz"
    assert cli(bloom) == 0
    setup, files, weights = stored_model("bloom")
    assert setup == {
        "engine": "accelerate",
        "task": "text-generation",
        "revision": "main",
        "model_version": "1.0",
        "dtype": "float16",
        "max_length": 50,
        "step_timeout": 300.0,
        "device_map": "auto",
        "max_memory": {"0": "10GiB", "1": "10GiB", "cpu": "30GiB"},
        "offload_folder": "offload",
    }
    assert (files, weights) == (files_of(llama), (llama / "model.safetensors").read_bytes())
    captured = capsys.readouterr()
    for key, value in setup.items():
        assert f"    {key}: {json.dumps(value)}\n" in captured.out
    assert "bloom.tar.gz contains bloom, version 1.0\n" in captured.out
    handler = "".join(f"    | {line}\n" for line in HANDLER.splitlines())
    assert f"custom_handler.py, was not run; Triptych replaces it. Its source:\n{handler}" in (
        captured.out
    )
    assert "serve it with: TRIPTYCH_TEXT_MODEL=bloom:" in captured.out
    for note in (
        "requirements.txt is ignored: Triptych brings the packages it needs",
        "model-config.yaml: minWorkers is ignored: one group of ranks holds the model",
        "setup_config.json: low_cpu_mem_usage is ignored: weights are always",
    ):
        assert f"note: {note}" in captured.err
    assert bentoml.models.get("bloom").info.metadata["source"] == str(bloom)
    again = shutil.copy(bloom, tmp_path / "again.tar.gz")
    assert cli(again) == 0
    assert "already in the store, unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("how", [(), NO_ARCHIVE, ("--archive-format", "default")])
def test_deepspeeds_archive(how: tuple[str, ...], llama: Path, store: Path, tmp_path: Path) -> None:
    archive = deepspeed_archive(tmp_path / "opt", llama, *how)
    before = {p: p.stat().st_mtime_ns for p in archive.rglob("*")}
    assert cli(archive, "--name", "served") == 0
    setup, files, weights = stored_model("served")
    assert setup == {
        "engine": "deepspeed",
        "task": "text-generation",
        "model_version": "1.0",
        "max_length": 80,
        "max_new_tokens": 50,
        "tensor_parallel": 2,
        "step_timeout": 120.0,
        "deepspeed": without_tp_size(DS_CONFIG),
    }
    assert (files, weights) == (files_of(llama), (llama / "model.safetensors").read_bytes())
    assert {p: p.stat().st_mtime_ns for p in archive.rglob("*")} == before, "unchanged"


def test_miis_archive(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_image_model("stable-diffusion", tmp_path / "sd")
    archive = mii_archive(tmp_path / "stable-diffusion", model)
    assert archive.name == "stable-diffusion.mar"
    assert cli(archive) == 0
    setup, files, _ = stored_model("stable-diffusion")
    assert setup["engine"] == "mii"
    assert setup["task"] == "text-to-image"
    assert files == files_of(model)
    assert "serve it with: TRIPTYCH_IMAGE_MODEL=stable-diffusion:" in capsys.readouterr().out


def test_miis_archive_of_the_repository(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_pipeline(tmp_path / "sd")
    assert cli(mii_archive(tmp_path / "made", model, MII_OF_THE_REPOSITORY)) == 0
    assert stored_model("stable-diffusion")[0] == {
        "engine": "mii",
        "task": "text-to-image",
        "model_version": "1.0",
        "dtype": "float32",
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
    }
    message = capsys.readouterr().err
    assert "mii.provider is ignored: the model folder tells" in message
    assert "mii.ds_zero is ignored" in message
    assert "unknown" not in message


def test_miis_archive_for_text(llama: Path, store: Path, tmp_path: Path) -> None:
    archive = mii_text_archive(tmp_path / "mii-llm", llama)
    assert cli(archive) == 0
    assert stored_model("mii-llm")[0] == {
        "engine": "mii",
        "task": "text-generation",
        "model_version": "1.0",
        "max_new_tokens": 256,
        "tensor_parallel": 4,
        "step_timeout": 1200.0,
        "mii": {"max_length": 4096},
    }


def test_an_archive_without_weights(
    empty: Path, llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, store, empty)
    assert "opt.tar.gz/checkpoints is not a model folder: it has neither config.json" in message
    assert message.endswith(": give the folder of the weights with --model-path\n")
    (copy(llama, tmp_path / "checkpoints") / "model.safetensors").unlink()
    message = refusal(capsys, store, deepspeed_archive(tmp_path / "opt", tmp_path / "checkpoints"))
    assert (
        "model.safetensors is missing: give the folder of the weights with --model-path" in message
    )
    assert cli(empty, "--model-path", llama) == 0
    setup, files, _ = stored_model("opt")
    assert (setup["engine"], setup["max_new_tokens"]) == ("deepspeed", 50)
    assert files == files_of(llama)


def test_names_and_options(
    empty: Path, llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = accelerate_archive(tmp_path / "a", llama, "--version", "2.1-rc", name="OPT_30b.")
    message = refusal(capsys, store, archive, "--name", "opt", "--model-path", llama)
    assert "has model.zip: --model-path is for an archive without a model" in message
    assert "'opt_30b.' is not a model name" in (message := refusal(capsys, store, archive))
    assert message.endswith(": choose another with --name\n")
    assert cli(archive, "--name", "opt", "--max-length", "7", "--dtype", "float32") == 0
    setup, _, _ = stored_model("opt")
    assert (setup["max_length"], setup["dtype"]) == (7, "float32")
    assert setup["model_version"] == "2.1-rc"


def test_a_config_file_of_another_name(llama: Path, store: Path, tmp_path: Path) -> None:
    archive = deepspeed_archive(tmp_path / "opt", llama, *NO_ARCHIVE)
    (archive / "model-config.yaml").rename(archive / "opt.yaml")
    manifest = json.loads((archive / "MAR-INF/MANIFEST.json").read_text())
    edit_json(
        archive / "MAR-INF/MANIFEST.json", model=manifest["model"] | {"configFile": "opt.yaml"}
    )
    assert cli(archive) == 0
    assert stored_model("opt")[0]["engine"] == "deepspeed"


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_pickled_weights(
    llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pickled(copy(llama, tmp_path / "pickled"), shards=2)
    archive = accelerate_archive(tmp_path / "bloom", model)
    assert "--convert-checkpoints converts it" in refusal(capsys, store, archive)
    assert cli(archive, "--convert-checkpoints") == 0
    assert "model-00002-of-00002.safetensors" in stored_model("bloom")[1]


def test_a_pickle_with_a_payload(
    llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy(llama, tmp_path / "evil")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    archive = accelerate_archive(tmp_path / "bloom", model)
    message = refusal(capsys, store, archive, "--convert-checkpoints")
    assert "pytorch_model.bin contains more than weights" in message
    assert not (tmp_path / "marker").exists()


def test_no_archive_at_all(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.mar does not exist" in refusal(capsys, store, tmp_path / "none.mar")
    (tmp_path / "text.mar").write_text("text")
    assert "neither a .mar, nor a .tar.gz, nor a folder" in refusal(
        capsys, store, tmp_path / "text.mar"
    )
    with pytest.raises(SystemExit) as stop:
        cli(tmp_path / "text.mar", "--max-unpacked-size", "huge")
    assert stop.value.code == 2
