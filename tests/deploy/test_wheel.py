"""The wheel: built from a copy of the checkout, installed without it, and imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.server import ROOT

PACKAGES = {"api", "cli", "demo_models", "deploy", "model_store_scripts", "runners"}
MODULES = {"service.py", "settings.py", "model_choice.py"}
NOT_PACKAGED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
IMPORTS = """
import json, sys
import api.openai, cli.join, demo_models.text.build, deploy.kubernetes, model_choice
import model_store_scripts.import_model, runners.contracts, service, settings
from demo_models.image.build import WEIGHTS
from runners.text.cpu.library import NATIVE
modules = {name: sys.modules[name].__file__ for name in ("api", "runners.contracts", "service")}
folders = {"native": NATIVE, "weights": WEIGHTS}
print(json.dumps(modules | {name: str(folder) for name, folder in folders.items()}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pip wheel` of a copy: a build in place would leave its files in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, work / "source", ignore=NOT_PACKAGED)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(work), str(source)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = work.glob("triptych-*.whl")
    return path


def test_it_holds_all_files_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == wanted | MODULES
    for name in ("runners/text/cpu/native/kernels.cpp", "demo_models/text/weights/config.json"):
        assert name in names


def test_it_is_imported_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    # The dependencies come from the environment of the tests. As a folder of PYTHONPATH its .pth
    # files, with the one of the editable install, are not read.
    dependencies = os.pathsep.join({sysconfig.get_path(p) for p in ("purelib", "platlib")})
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("TRIPTYCH_", "PYTHON"))}
    done = subprocess.run(
        [python, "-c", IMPORTS],
        cwd=tmp_path, env=variables | {"PYTHONPATH": dependencies, "BENTOML_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths = {name: Path(path) for name, path in json.loads(done.stdout).items()}
    assert all(path.is_relative_to(environment) for path in paths.values()), paths
    assert list(paths["native"].glob("*.h"))
    assert list(paths["weights"].rglob("*.safetensors"))
