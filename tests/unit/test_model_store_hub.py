"""Importing from the hub: the real client against a double of the hub's protocol."""

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


class Here:
    """One machine: its model store, its hub cache, and the hub it can reach."""

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
        """Run, be refused in one sentence without a trace in the store, and return the sentence."""
        done = self.run(*argv, "--name", "refused", **env)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        models = self.home / "models"
        assert not models.exists() or not any(models.iterdir())
        return done.stderr.removeprefix("error: ").strip()


@pytest.fixture
def here(tmp_path: Path, hub: Hub) -> Here:
    return Here(tmp_path, hub)


def test_a_hub_model(llama: Path, here: Here, hub: Hub, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "remote")
    for name in (".gitattributes", "model.onnx", "pytorch_model.bin", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    hub.repositories["porto/lume"] = Repository(folder)
    done = here.run("porto/lume", "--name", "lume")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: left out: model.onnx, original/params.json, pytorch_model.bin\n"
    tag = done.stdout.split()[0]
    assert done.stdout.endswith(f"serve it with: TRIPTYCH_TEXT_MODEL={tag} bentoml serve .\n")
    item = here.home / "models" / tag.replace(":", "/")
    assert json.loads((item / "setup_config.json").read_text())["revision"] == MAIN
    assert f"revision: {MAIN}" in (item / "model.yaml").read_text()
    weights = item / "model" / "model.safetensors"
    assert weights.read_bytes() == (llama / "model.safetensors").read_bytes()
    assert not weights.is_symlink()
    assert sorted(hub.downloads()) == sorted(p.name for p in llama.iterdir())

    hub.seen.clear()
    again = here.run("porto/lume", "--name", "lume", "--revision", MAIN)
    assert again.stdout.startswith(f"{tag}  already in the store, unchanged")
    assert hub.downloads() == []
    offline = here.run("porto/lume", "--name", "lume", HF_HUB_OFFLINE="1")
    assert offline.stdout.startswith(f"{tag}  already in the store, unchanged")

    (folder / "model.onnx").write_text("a commit that is not about what we take")
    hub.repositories["porto/lume"].commit = "1" * 40
    next_commit = here.run("porto/lume", "--name", "lume")
    assert next_commit.stdout.startswith(f"{tag}  already in the store, unchanged")


def test_a_pipeline_on_the_hub(here: Here, hub: Hub, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("")
    (folder / "big.ckpt").write_text("")
    hub.repositories["porto/painter"] = Repository(folder)
    done = here.run("porto/painter", "--name", "painter")
    assert done.returncode == 0, done.stderr
    assert "TRIPTYCH_IMAGE_MODEL=painter:" in done.stdout
    assert not {"big.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors"} & {*hub.downloads()}


def test_what_a_hub_model_may_not_have(here: Here, hub: Hub, llama: Path, tmp_path: Path) -> None:
    remote = hub.repositories
    remote["porto/code"] = Repository(llama, listing={"modeling.py": llama / "config.json"})
    assert here.refuses("porto/code").startswith("modeling.py is code")
    remote["porto/up"] = Repository(llama, listing={"../../up.json": llama / "config.json"})
    assert "is not a file name" in here.refuses("porto/up")
    remote["porto/auto"] = Repository(copy(llama, tmp_path / "auto"))
    edit_json(tmp_path / "auto" / "tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"})
    assert here.refuses("porto/auto").startswith("tokenizer_config.json has auto_map")
    remote["porto/pickle"] = Repository(pickled(copy(llama, tmp_path / "pickle")))
    assert here.refuses("porto/pickle").startswith("pytorch_model.bin is a pickle")
    assert not [n for n in hub.downloads() if n.endswith((".safetensors", ".bin", ".py"))]
    assert here.run("porto/pickle", "--name", "p", "--convert-checkpoints").returncode == 0


def test_missing_gated_and_broken(here: Here, hub: Hub, llama: Path, tmp_path: Path) -> None:
    hub.repositories["porto/gated"] = Repository(llama, gated=True)
    hub.repositories["porto/broken"] = Repository(llama, broken=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("soon")
    hub.repositories["porto/empty"] = Repository(tmp_path / "empty")

    nowhere = f"is neither a folder here nor a model on {hub.url} (a private one needs HF_TOKEN)"
    assert here.refuses("porto/none") == f"porto/none {nowhere}"
    assert here.refuses("porto/none", HF_TOKEN="hf_wrong") == f"porto/none {nowhere}"
    assert here.refuses("porto/a--b") == f"porto/a--b {nowhere}"
    said = here.refuses("porto/gated", "--revision", "v9")
    assert said == "porto/gated has no revision v9"
    ask = f"porto/gated is gated: ask for access at {hub.url}/porto/gated; "
    assert here.refuses("porto/gated") == ask + "then set HF_TOKEN"
    said = here.refuses("porto/gated", HF_TOKEN="hf_wrong")
    assert said == ask + "HF_TOKEN's account has no access"
    assert here.run("porto/gated", "--name", "g", HF_TOKEN="hf_right").returncode == 0
    here.home = tmp_path / "other"
    here.env["BENTOML_HOME"] = str(here.home)
    assert here.refuses("porto/empty").startswith("porto/empty holds no model to serve")
    assert "503" in here.refuses("porto/broken")


def test_no_hub_in_reach(here: Here, hub: Hub) -> None:
    said = here.refuses("porto/lume", HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("http://127.0.0.1:9 can not be reached (")
    said = here.refuses("porto/lume", HF_HUB_OFFLINE="1")
    assert said == "porto/lume is not wholly in the cache, and HF_HUB_OFFLINE is set"


def test_a_download_that_is_not_what_was_promised(here: Here, hub: Hub, llama: Path) -> None:
    hub.repositories["porto/lume"] = Repository(llama)
    hub.damaged.add("model.safetensors")
    said = here.refuses("porto/lume")
    assert said.startswith("model.safetensors is not what its source promises: delete ")
    hub.damaged.clear()
    Path(said.split("delete ")[1].removesuffix(", import again")).unlink()
    assert here.run("porto/lume", "--name", "lume").returncode == 0


def test_the_revision_of_a_published_config(
    here: Here, hub: Hub, llama: Path, tmp_path: Path
) -> None:
    hub.repositories["porto/lume"] = Repository(llama)
    edit_json(tmp_path / "setup.json", revision="v9")
    taken = ("porto/lume", "--setup-config", str(tmp_path / "setup.json"))
    assert here.refuses(*taken) == "porto/lume has no revision v9"
    assert here.run(*taken, "--name", "x", "--revision", "main").returncode == 0
