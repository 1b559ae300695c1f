"""The README tells the truth: its examples print what they promise, its tables are the types'."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import write_model
from tests.support.readme import README, Example, examples, with_tables
from tests.support.server import ROOT, Server, environment


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo models, served as `make serve` does."""
    home = tmp_path_factory.mktemp("readme")
    subprocess.run(
        [sys.executable, "-m", "model_store_scripts.make_demo_models"],
        cwd=ROOT,
        env=environment(home),
        check=True,
    )
    models = {"TRIPTYCH_TEXT_MODEL": "demo-text", "TRIPTYCH_IMAGE_MODEL": "demo-image"}
    with Server(home, models) as running:
        yield running


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: a checkout with somebody's own model in it."""
    folder = tmp_path_factory.mktemp("checkout")
    write_model("opt", folder / "my-model")
    return folder


@pytest.mark.parametrize("example", examples(), ids=lambda e: e.code.splitlines()[0][:40])
def test_examples_print_what_they_promise(example: Example, demo: Server, workdir: Path) -> None:
    example.check(url=demo.url, cwd=workdir, env=environment(workdir / "store"))


def test_there_are_examples_of_all_kinds() -> None:
    code = "\n".join(example.code for example in examples())
    for needed in ("curl ", "openai", "bentoml.SyncHTTPClient", "import_model"):
        assert needed in code


def test_tables_are_those_of_the_types() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: make docs"
