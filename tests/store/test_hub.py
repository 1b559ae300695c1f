"""Importing from the hub: the real client against a fake hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import MAIN, Hub, Repository
from tests.support.model_store import copy, edit_json, pickled, write_pipeline


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


class Machine:
    """One machine: its model store, its hub cache, and the hub that it uses."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.home = folder / "home"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self.env |= {
            "BENTOML_HOME": str(self.home),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "HOME": str(folder),
        }

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        """The command as a user runs it."""
        return subprocess.run(
            [sys.executable, "-m", "model_store_scripts.import_model", *argv],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def refuses(self, *argv: str, **env: str) -> str:
        """The one sentence that refuses an import, which leaves no trace in the store."""
        done = self.run(*argv, "--name", "refused", **env)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        models = self.home / "models"
        assert not models.exists() or not any(models.iterdir())
        return done.stderr.removeprefix("error: ").strip()


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub)


def test_a_hub_model(text_model: Path, machine: Machine, hub: Hub, tmp_path: Path) -> None:
    folder = copy(text_model, tmp_path / "remote")
    for name in (".gitattributes", "model.onnx", "pytorch_model.bin", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    hub.repositories["porto/lume"] = Repository(folder)
    done = machine.run("porto/lume", "--name", "lume")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: left out: model.onnx, original/params.json, pytorch_model.bin\n"
    tag = done.stdout.split()[0]
    assert done.stdout.endswith(f"serve it with: TRIPTYCH_TEXT_MODEL={tag} bentoml serve .\n")
    item = machine.home / "models" / tag.replace(":", "/")
    assert json.loads((item / "setup_config.json").read_text())["revision"] == MAIN
    assert f"revision: {MAIN}" in (item / "model.yaml").read_text()
    weights = item / "model" / "model.safetensors"
    assert weights.read_bytes() == (text_model / "model.safetensors").read_bytes()
    assert not weights.is_symlink()
    assert sorted(hub.downloads()) == sorted(p.name for p in text_model.iterdir())

    hub.requests.clear()
    again = machine.run("porto/lume", "--name", "lume", "--revision", MAIN)
    assert again.stdout.startswith(f"{tag}  already in the store, unchanged")
    assert hub.downloads() == []
    offline = machine.run("porto/lume", "--name", "lume", HF_HUB_OFFLINE="1")
    assert offline.stdout.startswith(f"{tag}  already in the store, unchanged")

    (folder / "model.onnx").write_text("a commit that changes no imported file")
    hub.repositories["porto/lume"].commit = "1" * 40
    next_commit = machine.run("porto/lume", "--name", "lume")
    assert next_commit.stdout.startswith(f"{tag}  already in the store, unchanged")


def test_a_pipeline_on_the_hub(machine: Machine, hub: Hub, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("")
    (folder / "big.ckpt").write_text("")
    hub.repositories["porto/image"] = Repository(folder)
    done = machine.run("porto/image", "--name", "image")
    assert done.returncode == 0, done.stderr
    assert "TRIPTYCH_IMAGE_MODEL=image:" in done.stdout
    assert not {"big.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors"} & {*hub.downloads()}


def test_unsafe_hub_models(machine: Machine, hub: Hub, text_model: Path, tmp_path: Path) -> None:
    remote = hub.repositories
    remote["porto/code"] = Repository(
        text_model, listing={"modeling.py": text_model / "config.json"}
    )
    assert machine.refuses("porto/code").startswith("modeling.py is code")
    remote["porto/up"] = Repository(
        text_model, listing={"../../up.json": text_model / "config.json"}
    )
    assert "is not a file name" in machine.refuses("porto/up")
    remote["porto/auto"] = Repository(copy(text_model, tmp_path / "auto"))
    edit_json(tmp_path / "auto" / "tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"})
    assert machine.refuses("porto/auto").startswith("tokenizer_config.json has auto_map")
    remote["porto/pickle"] = Repository(pickled(copy(text_model, tmp_path / "pickle")))
    assert machine.refuses("porto/pickle").startswith("pytorch_model.bin is a pickle")
    assert not [n for n in hub.downloads() if n.endswith((".safetensors", ".bin", ".py"))]
    assert machine.run("porto/pickle", "--name", "p", "--convert-checkpoints").returncode == 0


def test_missing_gated_and_broken(
    machine: Machine, hub: Hub, text_model: Path, tmp_path: Path
) -> None:
    hub.repositories["porto/gated"] = Repository(text_model, gated=True)
    hub.repositories["porto/broken"] = Repository(text_model, broken=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("soon")
    hub.repositories["porto/empty"] = Repository(tmp_path / "empty")

    nowhere = f"is neither a local folder nor a model on {hub.url} (a private model needs HF_TOKEN)"
    assert machine.refuses("porto/none") == f"porto/none {nowhere}"
    assert machine.refuses("porto/none", HF_TOKEN="hf_wrong") == f"porto/none {nowhere}"
    assert machine.refuses("porto/a--b") == f"porto/a--b {nowhere}"
    message = machine.refuses("porto/gated", "--revision", "v9")
    assert message == "porto/gated has no revision v9"
    ask = f"porto/gated is gated: request access at {hub.url}/porto/gated; "
    assert machine.refuses("porto/gated") == ask + "then set HF_TOKEN"
    message = machine.refuses("porto/gated", HF_TOKEN="hf_wrong")
    assert message == ask + "HF_TOKEN's account has no access"
    assert machine.run("porto/gated", "--name", "g", HF_TOKEN="hf_right").returncode == 0
    machine.home = tmp_path / "other"
    machine.env["BENTOML_HOME"] = str(machine.home)
    assert machine.refuses("porto/empty").startswith("porto/empty has no model to serve")
    assert "503" in machine.refuses("porto/broken")


def test_an_unreachable_hub(machine: Machine, hub: Hub) -> None:
    message = machine.refuses("porto/lume", HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith("http://127.0.0.1:9 cannot be reached (")
    message = machine.refuses("porto/lume", HF_HUB_OFFLINE="1")
    assert message == "porto/lume is not completely in the cache, and HF_HUB_OFFLINE is set"


def test_a_download_that_does_not_match_its_checksum(
    machine: Machine, hub: Hub, text_model: Path
) -> None:
    hub.repositories["porto/lume"] = Repository(text_model)
    hub.damaged.add("model.safetensors")
    message = machine.refuses("porto/lume")
    assert message.startswith("model.safetensors does not match its checksum: delete ")
    hub.damaged.clear()
    Path(message.split("delete ")[1].removesuffix(", import again")).unlink()
    assert machine.run("porto/lume", "--name", "lume").returncode == 0


def test_the_revision_of_a_published_config(
    machine: Machine, hub: Hub, text_model: Path, tmp_path: Path
) -> None:
    hub.repositories["porto/lume"] = Repository(text_model)
    edit_json(tmp_path / "setup.json", revision="v9")
    arguments = ("porto/lume", "--setup-config", str(tmp_path / "setup.json"))
    assert machine.refuses(*arguments) == "porto/lume has no revision v9"
    assert machine.run(*arguments, "--name", "x", "--revision", "main").returncode == 0
