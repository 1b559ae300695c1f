"""Fixtures of the tests that need a model or a server."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.server import Server

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each compute with a thread for every core take them from one another.
    os.environ["OMP_NUM_THREADS"] = "1"

# Before Triton is imported, which reads it then. Without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

LOOPING = "loop"
"""A conversation that begins with it makes the template below loop."""
CHAT_TEMPLATE = (
    f"{{% if messages[0]['content'] == '{LOOPING}' %}}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template and a context long enough to be interrupted in."""
    from tests.support.models import write_model  # loads torch

    folder = write_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


@pytest.fixture(scope="session")
def bentoml_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store of our own, empty at first."""
    return tmp_path_factory.mktemp("bentoml")


@pytest.fixture(scope="session")
def server(text_model: Path, bentoml_home: Path) -> Iterator[Server]:
    """One server with default settings, for all tests that change nothing about it."""
    with Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(text_model)}) as running:
        yield running


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Rank groups of this process fork their ranks, which saves each rank its imports."""
    from tests.support.forked_ranks import forking  # loads torch

    with forking():
        yield


@pytest.fixture(scope="session")
def checks() -> ModuleType:
    """`tests.support.openapi`, whose import takes seconds: all test files are imported at first."""
    return importlib.import_module("tests.support.openapi")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except what importing BentoML itself sets off."""
    for message in ("GitWildMatchPattern", "The `__get_pydantic_core_schema__` method"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:DeprecationWarning")
