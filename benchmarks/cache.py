"""The cache folder of the benchmarks: generated models, installed peers, model stores and logs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".bench"
"""Hidden, so that linters and test runners do not take installed packages for our sources."""


class Unavailable(Exception):
    """A measurement is impossible on this machine; the message gives the cause."""


def cache() -> Path:
    """The cache folder, made if necessary, with a `.gitignore` that excludes it."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return CACHE


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Folder `name` of the cache, filled by `make` the first time; an incomplete one is rebuilt."""
    folder = cache() / name
    marker = folder / ".complete"
    if not marker.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"preparing {name} ...", flush=True)
        make(folder)
        marker.touch()
    return folder


def packages(name: str, *requirements: str, options: tuple[str, ...] = ()) -> Path:
    """A folder with packages installed outside this environment. Raises: Unavailable."""

    def install(folder: Path) -> None:
        run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder),
             *options, *requirements])  # fmt: skip

    return cached(f"packages/{name}", install)


def run(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a set-up command. Returns its output; raises Unavailable with the last lines of it."""
    try:
        process = subprocess.run(
            command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    if process.returncode != 0:
        last = "\n".join(process.stdout.strip().splitlines()[-8:])
        raise Unavailable(f"{Path(command[0]).name} failed: {last}")
    return process.stdout
