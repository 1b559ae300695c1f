"""Importing archives, and reading what is in the store afterwards."""

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


def refusal(capsys: pytest.CaptureFixture[str], store: Path, *argv: str | Path) -> str:
    """The one sentence that refuses an import; nothing of it is left."""
    assert cli(*argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "triptych-import-" not in captured.err, "the temporary folder is not shown"
    assert is_empty(store)
    return captured.err


def stored_model(name: str) -> tuple[dict[str, Any], set[str], bytes]:
    """A stored model's configuration, the names of its files, and its weights."""
    folder = Path(bentoml.models.get(name).path)
    files = {p.relative_to(folder / "model").as_posix() for p in (folder / "model").rglob("*.*")}
    weights = folder / "model" / "model.safetensors"
    setup: dict[str, Any] = json.loads((folder / "setup_config.json").read_text())
    assert load_setup_config(folder, name=name)[1] == [], "no obsolete keys"
    return setup, files, weights.read_bytes() if weights.exists() else b""
