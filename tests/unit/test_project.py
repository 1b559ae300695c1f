"""Promises about the project's own files."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    p
    for p in sorted(ROOT.rglob("*.py"))
    if not p.relative_to(ROOT).parts[0].startswith((".", "build"))
]


def test_the_bento_has_the_packages_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bento = yaml.safe_load((ROOT / "bentofile.yaml").read_text())
    extras = project["optional-dependencies"]
    mii = [package for package in extras["mii"] if not package.startswith("triptych[")]
    assert bento["python"]["packages"] == project["dependencies"] + mii


def test_the_image_has_deepspeed_and_mii_as_a_checkout_has_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = (ROOT / "deploy/setup_image.sh").read_text()
    makefile = (ROOT / "Makefile").read_text()
    [deepspeed] = project["optional-dependencies"]["deepspeed"]
    assert f"uv pip install --no-build-isolation {deepspeed}\n" in script
    mii = re.search(r"^MII := (\S+)$", makefile, re.M)
    assert mii is not None
    assert f"uv pip install --no-deps {mii[1]}\n" in script
    assert 'python_version="3.11"' in (ROOT / "service.py").read_text()
    assert "uv python install 3.11" in (ROOT / "deploy/Containerfile").read_text()


def test_no_file_is_too_long_to_read() -> None:
    long = {str(p.relative_to(ROOT)) for p in SOURCES if len(p.read_text().splitlines()) > 400}
    assert long == set()


def test_packages_that_are_not_what_mii_takes_them_for_stay_out() -> None:
    installed = {found.name.lower() for found in distributions()}
    assert not installed & {"fastchat", "asyncio"}
