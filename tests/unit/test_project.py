"""Promises about the project's own files."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
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


def imports(path: Path) -> set[str]:
    """Modules a file imports when it is imported, so not those inside functions or for types."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("api", ("api", "runners.contracts", "runners.errors")),
        ("runners/ragged", ("runners.ragged", "runners.ranks", "runners.config",
                            "runners.contracts", "runners.dtypes", "runners.errors")),
        ("runners/imaging", ("runners.imaging", "runners.ranks", "runners.config",
                             "runners.image_config", "runners.contracts", "runners.dtypes",
                             "runners.errors")),
        ("runners/tasks", ("runners.tasks", "runners.ranks", "runners.contracts",
                           "runners.errors")),
        ("runners/contracts", ("runners.contracts", "runners.errors")),
        ("runners/ranks", ("runners.ranks", "runners.config", "runners.contracts",
                           "runners.errors")),
        ("runners/mii_deployment", ("runners.mii_deployment", "runners.ranks", "runners.errors")),
        ("runners/mii_backend", ("runners.mii_backend", "runners.mii_deployment",
                                 "runners.mii_config", "runners.ragged", "runners.ranks",
                                 "runners.config", "runners.contracts", "runners.errors")),
        ("deploy", ("deploy", "model_choice", "settings", "runners.config", "runners.contracts",
                    "runners.errors", "model_store_scripts.safetensors_header")),
        ("model_store_scripts", ("model_store_scripts", "runners.config", "runners.errors",
                                 "runners.torchserve_config")),
    ],
)  # fmt: skip
def test_imports_run_one_way(folder: str, allowed: tuple[str, ...]) -> None:
    ours = (
        "api",
        "deploy",
        "runners",
        "model_store_scripts",
        "service",
        "settings",
        "model_choice",
    )
    for path in (ROOT / folder).rglob("*.py"):
        for module in imports(path):
            if module.split(".")[0] in ours:
                assert module.startswith(allowed), f"{path.relative_to(ROOT)} imports {module}"


def test_nothing_of_a_deployment_loads_mii_but_the_models_processes() -> None:
    for path in (ROOT / "runners/mii_deployment").glob("*.py"):
        assert not {m for m in imports(path) if m.split(".")[0] in ("mii", "torch", "deepspeed")}


def test_no_file_is_too_long_to_read() -> None:
    long = {str(p.relative_to(ROOT)) for p in SOURCES if len(p.read_text().splitlines()) > 400}
    assert long == set()


def test_packages_that_are_not_what_mii_takes_them_for_stay_out() -> None:
    installed = {found.name.lower() for found in distributions()}
    assert not installed & {"fastchat", "asyncio"}
