"""Which wheels are gathered for a machine without a network."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks.cache import ROOT
from benchmarks.gpu_check import gather_wheels
from benchmarks.gpu_check.recorder import Result

CARD = "NVIDIA H100 80GB HBM3"


# --- results of parts, and which parts run


def result(*, state: str = "complete", ok: bool = True) -> Result:
    checks = [{"name": "a | check", "passed": ok, "detail": "0.81, at least 0.8", "bar": True}]
    return {"state": state, "checks": checks, "figures": {}, "skipped": {}, "seconds": 1.0}


def wheel(folder: Path, name: str, *requirements: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


INDEX: dict[str, tuple[str, ...]] = {
    "one": ("two>=2", "three; python_version < '3.12'", "torch>=9", "four; extra == 'x'"),
    "two": ("five==1", "one"),
    **dict.fromkeys(("three", "four", "five", "torch"), ()),
}


def fetch(requirement: Requirement, folder: Path) -> Path | None:
    if requirement.name not in INDEX:
        return None
    return wheel(folder, requirement.name, *INDEX[requirement.name])


def gathered(present: str, folder: Path, *names: str) -> tuple[list[str], str]:
    wheels, remarks = gather_wheels.gather(
        [Requirement(name) for name in names],
        gather_wheels.parse_freeze(present),
        gather_wheels.environment("3.12"),
        fetch,
        folder,
    )
    return [path.name.partition("-")[0] for path in wheels], "\n".join(remarks)


def test_requirements_of_requirements_are_gathered(tmp_path: Path) -> None:
    assert gathered("torch==2.11.0+cu130", tmp_path, "one")[0] == ["one", "two", "five"]


def test_what_is_present_is_left_out_if_it_is_new_enough(tmp_path: Path) -> None:
    assert gathered("two==2.1\n", tmp_path, "one")[0] == ["one"]
    names, remarks = gathered("two==1.9\nfive @ file:///five\n", tmp_path, "one")
    assert names == ["one", "two"]
    assert "two: for one, which needs two>=2; there is 1.9" in remarks


def test_what_has_no_wheel_is_named(tmp_path: Path) -> None:
    names, remarks = gathered("", tmp_path, "missing>=1", "five")
    assert names == ["five"]
    assert "missing: for Triptych; NOT carried" in remarks


def test_too_large_a_load_is_refused_with_its_largest_wheels(tmp_path: Path) -> None:
    wheels = []
    for name, size in (("small", 1), ("large", 3)):
        path = tmp_path / f"{name}.whl"
        path.write_bytes(b"x" * size * 2**20)
        wheels.append(path)
    gather_wheels.check_size(wheels, 4)
    with pytest.raises(
        gather_wheels.Refused, match=r"4\.0 MiB are more than 3; .*\n *3\.0 MiB large"
    ):
        gather_wheels.check_size(wheels, 3)


def test_the_groups_have_what_pyproject_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    def names(*groups: str) -> set[str]:
        return {requirement.name for requirement in gather_wheels.roots(project, groups)}

    assert {"pydantic", "msgspec", "platformdirs"} <= names("text")
    assert not names("text") & {"bentoml", "torch", "transformers", "diffusers", "fastapi"}
    assert names("images") == {"diffusers", "greenlet", "pillow"}
    assert names("deepspeed") == {"deepspeed"}
    assert {"deepspeed", "deepspeed-mii", "deepspeed-kernels", "grpcio"} <= names("mii")


def test_the_names_of_platforms() -> None:
    names = gather_wheels.platforms("manylinux_2_28_x86_64")
    assert names[0] == "manylinux_2_28_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(names)
    assert gather_wheels.parse_freeze("a.b_C==1.0+cu1\n# note\n") == {"a-b-c": Version("1.0+cu1")}
