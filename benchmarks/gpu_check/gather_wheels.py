"""`python -m benchmarks.gpu_check.gather_wheels`: what a machine without network lacks, as wheels.

It walks the requirements of the ranks and of the chosen parts of the check, leaves out what
`--present` (the output of `pip freeze` there) lists, and downloads the rest for that machine's
Python and platform. A package without such a wheel is built here, if that gives one for any
platform.
"""

from __future__ import annotations

import argparse
import email
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from benchmarks.cache import ROOT

LIMIT_MIB = 64
SERVER = frozenset(
    {"bentoml", "uvicorn", "httptools", "fastapi", "pydantic-settings", "huggingface-hub"}
)
"""Requirements of the HTTP server and of the import of models, which the check does not load."""
PLATFORM = frozenset({"torch", "transformers", "accelerate", "triton", "numpy"})
"""Used in the version that the machine has, whatever pyproject.toml says."""
UNUSED = frozenset(
    {"asyncio", "fastchat", "flask-restful", "werkzeug", "shortuuid", "grpcio-tools", "fastapi"}
) | {"cmake", "pillow"}
"""What other packages require and nothing that is run here imports: of MII, and cmake for the build
of deepspeed-kernels. The images need Pillow, which pyproject.toml says."""
PROJECT = "Triptych"
IMAGES = frozenset({"diffusers", "greenlet", "pillow"})
GROUPS = ("text", "images", "deepspeed", "mii")

Present = dict[str, Version | None]
"""Canonical name to version; None if that is unknown."""
Fetch = Callable[[Requirement, Path], Path | None]
"""Leaves a wheel in a folder, and returns its path; None if there is none."""


class Refused(Exception):
    """The wheels cannot be gathered; the message gives the cause."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    present = parse_freeze(args.present.read_text())
    markers = environment(args.python)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            fetch = Downloader(args.python, args.platform)
            wheels, remarks = gather(
                roots(project, args.groups), present, markers, fetch, Path(scratch)
            )
            print("\n".join(remarks))
            check_size(wheels, args.limit_mib)
            args.folder.mkdir(parents=True, exist_ok=True)
            for wheel in wheels:
                shutil.move(wheel, args.folder / wheel.name)
    except Refused as error:
        sys.exit(str(error))
    total = sum(path.stat().st_size for path in args.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {total / 2**20:.1f} MiB: {args.folder}")
    print(f"there: python -m pip install --no-index --no-deps --target site {args.folder}/*.whl")


def roots(project: dict[str, Any], groups: Sequence[str]) -> list[Requirement]:
    """The requirements of the ranks that the groups need, as pyproject.toml has them."""
    extras = project["project"]["optional-dependencies"]
    pinned = project["tool"]["triptych"]["pinned"]
    lines: list[str] = []
    base = [Requirement(line) for line in project["project"]["dependencies"]]
    wanted = [r for r in base if canonicalize_name(r.name) not in SERVER | PLATFORM]
    for requirement in wanted:
        group = "images" if canonicalize_name(requirement.name) in IMAGES else "text"
        if group in groups:
            lines.append(str(requirement))
    if {"deepspeed", "mii"} & set(groups):
        lines += extras["deepspeed"]
    if "mii" in groups:
        lines += [line for line in extras["mii"] if not line.startswith("triptych")]
        lines += [pinned["mii"], pinned["fastgen-kernels"]]
    return [Requirement(line) for line in lines]


def parse_freeze(text: str) -> Present:
    """What `pip freeze` lists."""
    present: Present = {}
    for line in text.splitlines():
        name, pinned, version = line.partition("==")
        if pinned:
            present[canonicalize_name(name.strip())] = Version(version.strip())
        elif " @ " in line:
            present[canonicalize_name(line.partition(" @ ")[0].strip())] = None
    return present


def environment(python: str) -> dict[str, str]:
    """The values of markers on Linux with this Python, such as 3.12."""
    here: dict[str, str] = dict(default_environment())  # type: ignore[arg-type]
    values = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "extra": "",
    }
    return here | values


def gather(
    requirements: Sequence[Requirement],
    present: Present,
    markers: dict[str, str],
    fetch: Fetch,
    folder: Path,
) -> tuple[list[Path], list[str]]:
    """The wheels of all that is missing, and remarks: what is carried and why, and what is not."""
    queue = deque((requirement, PROJECT) for requirement in requirements)
    wheels: dict[str, Path] = {}
    remarks = []
    while queue:
        requirement, parent = queue.popleft()
        name = canonicalize_name(requirement.name)
        unused = name in PLATFORM or (name in UNUSED and parent != PROJECT)
        if name in wheels or unused or not applies(requirement, markers):
            continue
        if name in present and satisfies(present[name], requirement):
            continue
        reason = f"{name}: for {parent}"
        if name in present:
            reason += f", which needs {requirement}; there is {present[name]}"
        wheel = fetch(requirement, folder)
        if wheel is None:
            remarks.append(f"{reason}; NOT carried: there is no wheel for that machine")
            continue
        wheels[name] = wheel
        remarks.append(f"{reason}, {wheel.stat().st_size / 2**20:.1f} MiB")
        queue += [(r, name) for r in requirements_of(wheel)]
    return list(wheels.values()), remarks


def applies(requirement: Requirement, markers: dict[str, str]) -> bool:
    """Whether a requirement holds there, without any extra."""
    return requirement.marker is None or requirement.marker.evaluate(markers)


def satisfies(version: Version | None, requirement: Requirement) -> bool:
    """Whether a version is good enough; one that is unknown is."""
    return version is None or requirement.specifier.contains(version, prereleases=True)


def requirements_of(wheel: Path) -> list[Requirement]:
    """The requirements in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        message = email.message_from_bytes(archive.read(names[0]))
    return [Requirement(line) for line in message.get_all("Requires-Dist") or []]


def check_size(wheels: Sequence[Path], limit_mib: float) -> None:
    """Raises: Refused if the wheels are larger together, with the largest of them."""
    sizes = sorted(((w.stat().st_size / 2**20, w.name) for w in wheels), reverse=True)
    total = sum(size for size, _ in sizes)
    if total > limit_mib:
        largest = "\n".join(f"  {size:6.1f} MiB {name}" for size, name in sizes[:5])
        raise Refused(f"{total:.1f} MiB are more than {limit_mib:.0f}; the largest:\n{largest}")


class Downloader:
    """Fetches wheels with pip for a Python and a platform, or builds them from their source."""

    def __init__(self, python: str, platform: str) -> None:
        self._target = [
            *("--python-version", python, "--implementation", "cp", "--only-binary=:all:"),
            *(f"--platform={name}" for name in platforms(platform)),
        ]

    def __call__(self, requirement: Requirement, folder: Path) -> Path | None:
        """See `Fetch`."""
        plain = f"{requirement.name}{requirement.specifier}"
        before = set(folder.glob("*.whl"))
        downloaded = self._pip("download", plain, folder, *self._target)
        # Built in this environment, since DeepSpeed's build imports torch.
        if not downloaded and not self._pip("wheel", plain, folder, "--no-build-isolation"):
            return None
        new = next(iter(set(folder.glob("*.whl")) - before), None)
        if new is None or downloaded:
            return new
        tags = parse_wheel_filename(new.name)[3]
        if any(tag.platform == "any" and tag.interpreter.startswith("py3") for tag in tags):
            return new
        new.unlink()
        return None

    @staticmethod
    def _pip(command: str, requirement: str, folder: Path, *options: str) -> bool:
        process = subprocess.run(
            [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", requirement,
             *("--dest" if command == "download" else "--wheel-dir", str(folder)), *options],
            env=os.environ | {"DS_BUILD_OPS": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return process.returncode == 0


def platforms(newest: str) -> list[str]:
    """A platform such as manylinux_2_28_x86_64 and the older ones whose wheels run there."""
    if not newest.startswith("manylinux_2_"):
        return [newest]
    minor, _, machine = newest.removeprefix("manylinux_2_").partition("_")
    names = [f"manylinux_2_{number}_{machine}" for number in range(int(minor), 4, -1)]
    return [*names, f"manylinux2014_{machine}", f"manylinux1_{machine}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.gather_wheels", description=__doc__
    )
    add = parser.add_argument
    add("folder", type=Path, help="where the wheels go")
    add("--present", type=Path, required=True, metavar="FILE", help="pip freeze of that machine")
    add("--python", default="3.12", help="its version of Python (default: 3.12)")
    add("--platform", default="manylinux_2_28_x86_64", help="the newest that it runs")
    add("--groups", type=_groups, default=list(GROUPS), metavar="A,B", help=", ".join(GROUPS))
    add("--limit-mib", type=float, default=LIMIT_MIB, help=f"of all wheels ({LIMIT_MIB})")
    return parser


def _groups(value: str) -> list[str]:
    groups = value.split(",")
    if unknown := [group for group in groups if group not in GROUPS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
    return groups


if __name__ == "__main__":
    main()
