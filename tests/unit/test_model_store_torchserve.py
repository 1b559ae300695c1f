"""Importing TorchServe's DeepSpeed example: the store has its configuration in one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bentoml
import pytest

from model_store_scripts.importing import ImportedModel, ImportRequest, import_model
from runners.config.deepspeed import without_tp_size
from runners.config.files import load_setup_config
from runners.contracts.errors import ConfigError, UnsafeModel
from tests.support.model_store import copy, edit_json, is_empty, pickled
from tests.support.torchserve import DS_CONFIG, edit, published


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    copy(llama, tmp_path / "opt-30b" / "checkpoints")
    return published(tmp_path / "opt-30b")


def run(source: Path, **options: object) -> ImportedModel:
    return import_model(ImportRequest(str(source), "served", **options))  # type: ignore[arg-type]


def stored_folder() -> Path:
    return Path(bentoml.models.get("served").path)


def config_of(folder: Path) -> tuple[dict[str, object], list[str]]:
    """The configuration of a folder without its path, and the warnings."""
    config: Any
    config, warnings = load_setup_config(folder, name="served")
    return config.model_dump(exclude={"model_path"}), warnings


def test_the_stored_model_is_run_as_the_folder_is(folder: Path, llama: Path, store: Path) -> None:
    (folder / "deepspeed_handler.py").write_text("")
    before, warnings = config_of(folder)
    imported = run(folder)
    assert list(imported.notes) == [*warnings, "left out: deepspeed_handler.py"]
    setup = json.loads((stored_folder() / "setup_config.json").read_text())
    assert setup == {
        "engine": "deepspeed",
        "task": "text-generation",
        "max_length": 80,
        "max_new_tokens": 50,
        "tensor_parallel": 2,
        "step_timeout": 120,
        "deepspeed": without_tp_size(DS_CONFIG),
    }
    assert config_of(stored_folder()) == (before, [])
    names = {f.name for f in (stored_folder() / "model").iterdir()}
    assert names == {f.name for f in llama.iterdir()}
    assert not run(folder).new
    assert run(stored_folder()).tag == imported.tag, "a stored model can be imported too"


def test_configuration_files_next_to_the_weights_are_not_imported(
    llama: Path, store: Path, tmp_path: Path
) -> None:
    flat = published(copy(llama, tmp_path / "flat"))
    edit(flat, '"checkpoints"', ".")
    assert not any("left out" in note for note in run(flat).notes)
    assert {f.name for f in (stored_folder() / "model").iterdir()} == {
        f.name for f in llama.iterdir()
    }


def test_bin_shards_are_converted(folder: Path, store: Path) -> None:
    before, _ = config_of(folder)
    pickled(folder / "checkpoints", shards=3)
    with pytest.raises(UnsafeModel, match=r"pytorch_model-00001-of-00003\.bin is a pickle"):
        run(folder)
    run(folder, convert_checkpoints=True)
    assert len(list((stored_folder() / "model").glob("*.safetensors"))) == 3
    assert config_of(stored_folder()) == (before, [])


@pytest.mark.parametrize("name", ["model-config.yaml", "of-another.yml"])
def test_a_model_config_as_setup_config(
    name: str, llama: Path, store: Path, tmp_path: Path
) -> None:
    other = published(tmp_path / "elsewhere")
    (other / "model-config.yaml").rename(other / name)
    source = copy(llama, tmp_path / "plain")
    edit_json(source / "setup_config.json", max_length=7)
    imported = run(source, setup_config=other / name, overrides={"max_batch_size": 3})
    assert "left out: setup_config.json" in imported.notes
    config: Any
    config, warnings = load_setup_config(stored_folder(), name="served")
    assert (config.engine, config.world_size, config.max_length) == ("deepspeed", 2, 80)
    assert (config.max_batch_size, warnings) == (3, [])


def test_another_engine_drops_the_deepspeed_section(folder: Path, store: Path) -> None:
    edit(folder, "torchrun:\n    nproc-per-node: 2\n", "")
    notes = run(folder, overrides={"engine": "accelerate"}).notes
    assert "deepspeed is ignored: it is for engine deepspeed, not accelerate" in notes
    assert load_setup_config(stored_folder(), name="served")[0].engine == "accelerate"


@pytest.mark.parametrize("how", ["absolute", "upwards", "linked"])
def test_a_model_path_that_leads_out(how: str, folder: Path, store: Path, tmp_path: Path) -> None:
    (folder / "checkpoints").rename(tmp_path / "out")
    named = {"absolute": str(tmp_path / "out"), "upwards": "../out", "linked": "checkpoints"}[how]
    edit(folder, '"checkpoints"', named)
    if how == "linked":
        (folder / "checkpoints").symlink_to(tmp_path / "out")
    with pytest.raises(UnsafeModel, match="leads out of") as caught:
        run(folder)
    if how != "linked":
        assert f"import {folder / named} itself, with --setup-config" in str(caught.value)
        assert run(tmp_path / "out", setup_config=folder / "model-config.yaml").new
    else:
        assert is_empty(store)


@pytest.mark.parametrize("how", ["absolute", "upwards", "linked"])
def test_a_ds_config_outside_of_the_folder(
    how: str, folder: Path, store: Path, tmp_path: Path
) -> None:
    (folder / "ds-config.json").rename(tmp_path / "out.json")
    named = {"absolute": str(tmp_path / "out.json"), "upwards": "../out.json"}.get(how, "in.json")
    edit(folder, "ds-config.json", named)
    if how == "linked":
        (folder / "in.json").symlink_to(tmp_path / "out.json")
    with pytest.raises(UnsafeModel, match=r"link that leads out|is not in the model folder"):
        run(folder)
    assert is_empty(store)


def test_an_offload_folder_that_leads_out(llama: Path, store: Path, tmp_path: Path) -> None:
    source = copy(llama, tmp_path / "plain")
    edit_json(source / "setup_config.json", offload_folder="/etc/cron.d")
    assert "offload_folder is ignored: only --offload-folder" in run(source).notes[0]
    assert "offload_folder" not in json.loads((stored_folder() / "setup_config.json").read_text())
    run(source, overrides={"offload_folder": "/data"})
    config, _ = load_setup_config(stored_folder(), name="m")
    assert config.model_dump()["offload_folder"] == "/data"


def test_mistakes_are_reported_before_anything_is_copied(folder: Path, store: Path) -> None:
    edit(folder, "responseTimeout: 120", "responseTimeout: 0")
    with pytest.raises(ConfigError, match=r"^model-config\.yaml: step_timeout: "):
        run(folder)
    edit(folder, "responseTimeout: 0", "responseTimeout: 120")
    edit_json(folder / "ds-config.json", tensor_parallel={"tp_size": "4"})
    with pytest.raises(ConfigError, match="tp_size: must be an integer from 1"):
        run(folder)
    edit_json(folder / "ds-config.json", tensor_parallel={"tp_size": 2})
    edit(folder, "handler:", "handler:\n    trust_remote_code: true")
    with pytest.raises(UnsafeModel, match=r"model-config\.yaml asks for trust_remote_code"):
        run(folder)
    shutil.rmtree(folder / "checkpoints")
    edit(folder, "    trust_remote_code: true\n", "")
    with pytest.raises(ConfigError, match="checkpoints is not a model folder: it has neither"):
        run(folder)
    assert is_empty(store)
