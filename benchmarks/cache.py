"""The folder that holds whatever the benchmarks make or install: the model, the peers, logs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".bench"
"""At the root and hidden, so that no tool takes what is installed there for our sources."""


class Unavailable(Exception):
    """A server can not be measured here; the message says why."""


def cache() -> Path:
    """The folder, ignored by git from within, as tools do with theirs."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return CACHE


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Folder `name` of the cache, filled by `make` once; half-made ones are made again."""
    folder = cache() / name
    done = folder / ".complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"preparing {name} ...", flush=True)
        make(folder)
        done.touch()
    return folder


def packages(name: str, *requirements: str, options: tuple[str, ...] = ()) -> Path:
    """A folder with installed packages, apart from this environment. Raises: Unavailable."""

    def install(folder: Path) -> None:
        run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder),
             *options, *requirements])  # fmt: skip

    return cached(f"packages/{name}", install)


def run(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a preparing command; returns its output. Raises: Unavailable with the end of it."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        last = "\n".join(done.stdout.strip().splitlines()[-8:])
        raise Unavailable(f"{Path(command[0]).name} failed: {last}")
    return done.stdout
