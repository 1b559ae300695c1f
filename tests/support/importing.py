"""Running the import of archives, and looking at what it left in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bentoml
import pytest

from model_store_scripts import import_archive
from runners.config.files import load_setup_config
from tests.support.model_store import is_empty


def cli(*argv: str | Path) -> int:
    return import_archive.main([str(a) for a in argv])


def refused(capsys: pytest.CaptureFixture[str], store: Path, *argv: str | Path) -> str:
    """The one sentence with which an import is refused; nothing of it is left."""
    assert cli(*argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "triptych-import-" not in said.err, "where it was unpacked is nobody's business"
    assert is_empty(store)
    return said.err


def stored(name: str) -> tuple[dict[str, Any], set[str], bytes]:
    """A stored model's configuration, its files, and its weights."""
    folder = Path(bentoml.models.get(name).path)
    files = {p.relative_to(folder / "model").as_posix() for p in (folder / "model").rglob("*.*")}
    weights = folder / "model" / "model.safetensors"
    setup: dict[str, Any] = json.loads((folder / "setup_config.json").read_text())
    assert load_setup_config(folder, name=name)[1] == [], "what is stored is in today's words"
    return setup, files, weights.read_bytes() if weights.exists() else b""
