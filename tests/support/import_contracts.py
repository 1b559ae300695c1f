"""The import contracts of `.importlinter`: `make lint-imports`.

import-linter knows packages only, so it is given a folder in which each module of the repository's
root is a package too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tests.support.server import ROOT


def link_packages(folder: Path) -> None:
    """Fill an empty folder with links to the root's packages, and its modules as packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for module in project["tool"]["setuptools"]["py-modules"]:
        (folder / module).mkdir()
        (folder / module / "__init__.py").symlink_to(ROOT / f"{module}.py")
    for package in {path.parent for path in ROOT.glob("*/__init__.py")} - {ROOT / "tests"}:
        (folder / package.name).symlink_to(package)


def broken_contracts(folder: Path) -> str:
    """import-linter's report on the packages of a folder; empty if all contracts are kept."""
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache", str(ROOT / ".importlinter")]
    env = os.environ | {"NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    # Without the logo above the contracts.
    report = done.stdout[max(0, done.stdout.find("Contracts\n")) :]
    return "" if done.returncode == 0 else report + done.stderr


def main() -> int:
    """Print the report if a contract is broken; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        link_packages(Path(folder))
        report = broken_contracts(Path(folder))
    print(report, end="", file=sys.stderr)
    return 1 if report else 0


if __name__ == "__main__":
    sys.exit(main())
