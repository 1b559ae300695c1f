"""What many of these tests begin with: a model, and a store of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small models run slower on more threads."""
    import torch  # takes a second

    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Triton's interpreter round to bfloat16 as a GPU does; it truncates."""
    import torch  # both take a second
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        halves = torch.from_numpy(data.copy()).to(torch.bfloat16)
        return halves.view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
