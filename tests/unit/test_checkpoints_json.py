"""The index of weight files that DeepSpeed reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_store_scripts.create_checkpoints_json import create_checkpoints_json, main


def weights(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_all_weights_below_the_folder_by_their_names_in_it(suffix: str, tmp_path: Path) -> None:
    shards = [f"model-0000{i}-of-00002{suffix}" for i in (1, 2)]
    folder = weights(tmp_path / "m", f"deep/er/more{suffix}", *reversed(shards))
    weights(folder, f".git/old{suffix}", "training_args.bin", "optimizer.pt", "config.json")
    output = tmp_path / "checkpoints.json"
    assert create_checkpoints_json(folder, output) == []
    assert json.loads(output.read_text()) == {
        "type": "ds_model",
        "checkpoints": [f"deep/er/more{suffix}", *shards],
        "version": 1.0,
    }


def test_deepspeed_reads_it(tmp_path: Path) -> None:
    factory = pytest.importorskip("deepspeed.runtime.state_dict_factory").SDLoaderFactory
    folder = weights(tmp_path / "m", "model.safetensors")
    output = tmp_path / "checkpoints.json"
    create_checkpoints_json(folder, output)
    index = factory.get_sd_loader_json(str(output), None)
    # DeepSpeed's `replace_transformer_layer` joins the names to base_dir.
    assert [(folder / name).is_file() for name in index["checkpoints"]] == [True]


def test_safetensors_take_precedence_and_a_note_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = weights(tmp_path / "m", "a.bin", "b.pt", "c.safetensors")
    output = tmp_path / "index.json"
    assert main([str(folder), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["checkpoints"] == ["c.safetensors"]
    out, err = capsys.readouterr()
    assert err == "note: .bin and .pt files are left out: there are safetensors\n"
    assert out == f"{output}: use it with DeepSpeed's base_dir {folder}\n"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "training_args.bin"], "has no weights: no .safetensors, .bin or .pt"),
        (["a.bin", "sub/b.pt"], "has both .bin and .pt files, such as a.bin and sub/b.pt: "),
        ([], "m is not a folder"),
    ],
)
def test_folders_without_an_index(
    names: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(tmp_path / "m", *names)
    output = tmp_path / "checkpoints.json"
    assert main([str(tmp_path / "m"), "--output", str(output)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_an_index_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = weights(tmp_path / "m", "a.bin")
    assert main([str(folder), "--output", str(tmp_path / "no" / "checkpoints.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
