"""MII in the tests, with a cache folder for each test, in which no deployment is known yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ROOT

pytest.importorskip("mii")
pytest.importorskip("zmq")

PATCHES = "import runners.engines.mii.patches\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone."""
    folder = tmp_path / "mii-cache"
    monkeypatch.setenv("MII_CACHE_PATH", str(folder))
    return folder


class Scripts:
    """Runs Python programs as a user would, each in a new process."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.env = os.environ | {
            "MII_CACHE_PATH": str(cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }

    def run(self, code: str, *, fails: bool = False, timeout: float = 120) -> str:
        """What the program prints; it must end well, unless it `fails`."""
        out = self.folder / "out.txt"
        with out.open("w") as file:
            status = subprocess.run(
                [sys.executable, "-c", code],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            ).returncode
        printed = out.read_text(encoding="utf-8", errors="replace")
        assert (status != 0) == fails, printed[-4000:]
        return printed


@pytest.fixture
def scripts(tmp_path: Path, cache: Path) -> Scripts:
    """Programs that run in a folder for this test alone."""
    return Scripts(tmp_path, cache)
