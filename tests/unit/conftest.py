"""What many of these tests begin with: a model, and a store of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    from tests.support.models import write_model  # loads torch

    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """An empty model store; its folder."""
    from tests.support.model_store import store_at

    with store_at(tmp_path / "home") as models:
        yield models
