"""The examples of the README and of the documentation's pages print what is written there.

All run against one server of the demo models. The guides, which need other models, have tests of
their own: `test_torchserve`, `test_mii` and `tests/deploy/test_docs`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import write_model
from tests.support.readme import DEMO_PAGES, Example, examples
from tests.support.server import ROOT, Server, environment

EXAMPLES = [
    pytest.param(example, id=f"{page.stem}: {example.code.splitlines()[0][:40]}")
    for page in DEMO_PAGES
    for example in examples(page)
]


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
    """Where the examples run: a checkout that contains the user's model."""
    folder = tmp_path_factory.mktemp("checkout")
    write_model("opt", folder / "my-model")
    return folder


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_prints_what_is_written(example: Example, demo: Server, workdir: Path) -> None:
    example.check(url=demo.url, cwd=workdir, env=environment(workdir / "store"))
