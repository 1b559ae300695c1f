"""The bento: its contents, what its models need, and serving it as its image does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.plan import BENTO_PATH
from tests.deploy.conftest import Home, stored
from tests.support.model_store import store_at
from tests.support.server import ROOT, Server, environment

SPREAD = {"engine": "deepspeed", "tensor_parallel": 4, "nnodes": 2}
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$@" >"$RECORDED"\n'


def folder_of(home: Home, tag: str) -> Path:
    return home.path / "bentos" / tag.replace(":", "/")


def test_a_bento_has_what_serving_takes_and_nothing_else(home: Home) -> None:
    bento = folder_of(home, home.bento)
    source = bento / "src"
    packages = ("api", "cli", "runners")
    wanted = {"service.py", "settings.py", "model_choice.py", "pyproject.toml"}
    wanted |= {"README.md", "LICENSE"}
    assert {p.name for p in source.iterdir()} == {*wanted, *packages, "bentofile.yaml"}
    files = [p for name in packages for p in (source / name).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".py", ".h", ".cpp"}
    tracked = [
        p
        for name in packages
        for p in (ROOT / name).rglob("*")
        if p.suffix in (".py", ".h", ".cpp")
    ]
    assert len(files) == len(tracked)
    assert sum(p.stat().st_size for p in bento.rglob("*") if p.is_file()) < 4_000_000


def test_a_bento_says_what_its_models_ask_for(home: Home) -> None:
    [service] = yaml.safe_load((folder_of(home, home.bento) / "bento.yaml").read_text())["services"]
    # Two ranks and an image model; eight sequences and four images at once.
    assert service["config"]["resources"] == {"gpu": 3}
    assert service["config"]["traffic"]["concurrency"] == 12


def test_the_image_is_labelled_and_offline(home: Home, tmp_path: Path) -> None:
    env = environment(home.path, RECORDED=str(tmp_path / "recorded"))
    labels = subprocess.run(
        [sys.executable, "-m", "deploy.labels", home.bento],
        cwd=ROOT, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / "buildah").write_text(RECORDER)
    (tmp_path / "buildah").chmod(0o700)
    command = ["containerize", home.bento, "--backend", "buildah", *labels.stdout.split()]
    done = home.run(*command, PATH=f"{tmp_path}{os.pathsep}{env['PATH']}", **recorded(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    words = (tmp_path / "recorded").read_text().splitlines()
    image = dict(words[i + 1].split("=", 1) for i, w in enumerate(words) if w == "--label")
    assert image["triptych.gpus"] == "3"
    assert image["triptych.models"] == f"{home.image}+{home.split}"
    assert image["org.opencontainers.image.version"] == home.bento.partition(":")[2]
    recipe = (folder_of(home, home.bento) / "env/docker/Dockerfile").read_text()
    assert recipe.count("FROM ") == 1
    for line in (
        "FROM triptych-base ",
        "ENV HF_HUB_OFFLINE=",
        "ENV BENTOML_DO_NOT_TRACK=",
        "USER bentoml",
    ):
        assert f"\n{line}" in recipe
    # The setup script reads pyproject.toml, so that is copied first.
    copied = recipe.index("COPY --chown=bentoml:bentoml ./src/pyproject.toml ./src/pyproject.toml")
    assert copied < recipe.index("pip install -r") < recipe.index("./env/docker/script__")
    assert "ENV BENTO_PATH=$BENTO_PATH" in recipe
    assert f"ARG BENTO_PATH={BENTO_PATH}\n" in recipe
    assert "BENTO_USER_UID=1034\n" in recipe


def recorded(folder: Path) -> dict[str, str]:
    return {"RECORDED": str(folder / "recorded")}


@pytest.fixture(scope="module")
def shipped(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A bento with a model that can be served, on another base image."""
    path = tmp_path_factory.mktemp("shipped") / "home"
    with store_at(path):
        tag = stored("small", text_model, {"gpus": 0})
        stored("broken", text_model, {"engine": "steam"})
        stored("spread", text_model, SPREAD)
    home = Home(path, tag, tag, "", "")
    chosen = ("--arg", "text_model=small", "--arg", "base_image=registry.example/base:2")
    done = home.run("build", ".", "-o", "tag", *chosen)
    assert done.returncode == 0, done.stderr
    [bento] = re.findall(r"triptych:\w+", done.stdout)
    return Home(path, tag, tag, "", "", bento)


def test_the_base_image_is_chosen_at_build_time(shipped: Home) -> None:
    recipe = (folder_of(shipped, shipped.bento) / "env/docker/Dockerfile").read_text()
    assert "\nFROM registry.example/base:2 " in recipe
    config = yaml.safe_load((folder_of(shipped, shipped.bento) / "bento.yaml").read_text())
    assert "resources" not in config["services"][0]["config"]


def test_a_model_that_cannot_be_served_is_not_built_in(shipped: Home) -> None:
    done = shipped.run("build", ".", "--arg", "text_model=broken")
    assert done.returncode != 0
    assert "triptych: setup_config.json: engine: must be one of" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_model_over_several_nodes_is_built_in_before_their_rendezvous(
    shipped: Home,
) -> None:
    done = shipped.run("build", ".", "-o", "tag", "--arg", "text_model=spread")
    [tag] = re.findall(r"triptych:\w+", done.stdout)
    config = yaml.safe_load((folder_of(shipped, tag) / "bento.yaml").read_text())
    assert config["services"][0]["config"]["resources"] == {"gpu": 2}


def test_an_image_model_is_not_built_in_as_a_text_model(home: Home) -> None:
    done = home.run("build", ".", "--arg", "text_model=diffusion")
    assert done.returncode != 0
    assert "is a model for text-to-image: choose it with TRIPTYCH_IMAGE_MODEL" in done.stderr


def test_it_serves_as_in_its_image_and_does_not_write_into_the_bento(
    shipped: Home, tmp_path: Path
) -> None:
    """The image's entrypoint with the Deployment's arguments, except for the paths."""
    bento, work = tmp_path / "bento", tmp_path / "work"
    shutil.copytree(folder_of(shipped, shipped.bento), bento)
    shutil.copytree(shipped.path / "models" / "small", bento / "models" / "small")
    work.mkdir()
    env = {"HOME": str(work), "BENTOML_HOME": str(work / "bentoml"), "BENTO_PATH": str(bento)}
    env |= {"BENTOML_CONTAINERIZED": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    env["TRIPTYCH_CPU_KERNELS"] = "false"  # compiling them takes long
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    server = Server(tmp_path, env, cwd=bento)
    entrypoint = ["bash", str(bento / "env/docker/entrypoint.sh")]
    server.command = [
        *entrypoint,
        "serve",
        "--timeout-graceful-shutdown",
        "5",
        "--host",
        "127.0.0.1",
    ]
    before = files(bento)
    with server:
        answer = server.post("/generate", {"prompt": "a", "max_new_tokens": 3})
        assert answer.json()["model"] == "small", answer.text
    assert files(bento) == before
    # The pods of other nodes start `cli.join` in the folder that the manifest names.
    joining = [*entrypoint, "python", "-m", "cli.join"]
    done = subprocess.run(
        joining, cwd=bento / "src", env=os.environ | env, capture_output=True, text=True
    )
    assert "neither a folder nor a tag" in done.stderr


def files(folder: Path) -> dict[str, float]:
    return {str(p.relative_to(folder)): p.stat().st_mtime for p in folder.rglob("*")}
