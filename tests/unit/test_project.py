"""Promises about the project's own files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.import_contracts import broken_contracts, link_packages

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    p
    for p in sorted(ROOT.rglob("*.py"))
    if not p.relative_to(ROOT).parts[0].startswith((".", "build"))
]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >>"$RECORDED"\n'


def test_the_bento_installs_what_pyproject_says(tmp_path: Path) -> None:
    """The script of the image, with the names of what it calls recorded."""
    bento = yaml.safe_load((ROOT / "bentofile.yaml").read_text())
    assert "/pyproject.toml" in bento["include"]
    assert bento["docker"]["setup_script"] == "deploy/setup_image.sh"
    (tmp_path / "src").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "src")
    for name in ("uv", "nvcc"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o700)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "RECORDED": str(tmp_path / "recorded")}
    subprocess.run([ROOT / "deploy/setup_image.sh"], cwd=tmp_path, env=env, check=True)
    pinned = PYPROJECT["tool"]["triptych"]["pinned"]
    assert (tmp_path / "recorded").read_text().splitlines() == [
        "uv pip install --requirements src/pyproject.toml",
        "uv pip install --no-build-isolation --requirements src/pyproject.toml --extra mii",
        f"uv pip install --no-deps {pinned['mii']}",
        f"uv pip install {pinned['fastgen-kernels']}",
    ]
    assert "triptych[deepspeed]" in PYPROJECT["project"]["optional-dependencies"]["mii"]


@pytest.mark.parametrize("package", ["torch", "deepspeed", "deepspeed-mii", "deepspeed-kernels"])
def test_versions_are_written_in_one_place(package: str) -> None:
    pin = re.compile(rf"\b{package}==\d")
    names = ("bentofile.yaml", "Makefile", "pyproject.toml", ".ci/run")
    files = [*(ROOT / name for name in names), *(ROOT / "deploy").iterdir()]
    texts = {file.name: file.read_text() for file in files if file.is_file()}
    pins = [name for name, text in texts.items() for _ in pin.findall(text)]
    assert pins == ["pyproject.toml"]


def test_mii_is_pinned_to_the_version_that_is_patched() -> None:
    source = (ROOT / "runners/engines/mii/patches/source_check.py").read_text()
    version = re.search(r'^MII_VERSION = "(.+)"$', source, re.M)
    assert version is not None
    assert PYPROJECT["tool"]["triptych"]["pinned"]["mii"] == f"deepspeed-mii=={version[1]}"


def test_python_versions_agree() -> None:
    project = PYPROJECT["project"]
    bounds = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"])
    assert bounds is not None
    versions = [f"3.{minor}" for minor in range(*map(int, bounds.groups()))]
    prefix = "Programming Language :: Python :: "
    classified = [c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(prefix)]
    assert classified == ["3", *versions]
    oldest = versions[0]
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    [image] = re.findall(r'python_version="(.+?)"', (ROOT / "service.py").read_text())
    assert image in versions
    assert f"uv python install {image}" in (ROOT / "deploy/Containerfile").read_text()


def test_no_file_is_too_long_to_read() -> None:
    long = {str(p.relative_to(ROOT)) for p in SOURCES if len(p.read_text().splitlines()) > 400}
    assert long == set()


def test_packages_that_mii_requires_by_mistake_are_not_installed() -> None:
    installed = {distribution.name.lower() for distribution in distributions()}
    assert not installed & {"fastchat", "asyncio"}


def test_the_import_contracts_are_kept(tmp_path: Path) -> None:
    link_packages(tmp_path)
    assert broken_contracts(tmp_path) == ""


def test_a_forbidden_import_breaks_its_contract(tmp_path: Path) -> None:
    links, copy = tmp_path / "links", tmp_path / "copy"
    links.mkdir()
    link_packages(links)
    shutil.copytree(links, copy, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (copy / "api/http/new.py").write_text("def load():\n    import torch\n")
    for module, line in (
        ("service/__init__.py", "from api.http.new import load"),
        ("runners/host/group.py", "import runners.text.sampling"),
    ):
        with (copy / module).open("a") as file:
            file.write(f"\n{line}\n")
    report = broken_contracts(copy)
    for chain in (
        r"service -> api\.http\.new .*\n +api\.http\.new -> torch ",
        r"runners\.host\.group -> runners\.text\.sampling ",
    ):
        assert re.search(chain, report), report
