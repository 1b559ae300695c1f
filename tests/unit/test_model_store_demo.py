"""The demo models are imported once, again when their sources change, and else left alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import bentoml
import pytest

from model_store_scripts.make_demo_models import DEMOS, Demo, make, source_digest
from tests.support.models import write_model


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_the_digest_covers_every_source(demo: Demo, tmp_path: Path) -> None:
    copy = replace(demo, folder=tmp_path / "package")
    shutil.copytree(demo.folder, copy.folder)
    digest = source_digest(copy)
    assert digest == source_digest(demo)
    paths = [copy.folder / name for name in demo.sources]
    files = [file for path in paths for file in (path, *path.rglob("*"))]
    for file in filter(Path.is_file, files):
        content = file.read_bytes()
        file.write_bytes(content + b"#")
        assert source_digest(copy) != digest, file
        file.write_bytes(content)
    assert source_digest(copy) == digest
    shutil.rmtree(copy.folder / "weights")
    with pytest.raises(FileNotFoundError):
        source_digest(copy)


def test_imported_once_and_again_when_the_sources_change(store: Path, tmp_path: Path) -> None:
    weights = tmp_path / "package" / "weights" / "numbers"
    weights.parent.mkdir(parents=True)
    weights.write_text("one")
    writes: list[Path] = []

    def write(target: Path) -> None:
        writes.append(write_model("llama", target))

    demo = Demo("text", "demo-text", tmp_path / "package", ("weights",), write)
    first = make(demo)
    assert first.new
    again = make(demo)
    assert (again.tag, again.new, len(writes)) == (first.tag, False, 1)
    forced = make(demo, force=True)
    assert (forced.new, forced.tag != first.tag) == (True, True)
    weights.write_text("two")
    second = make(demo)
    assert second.new
    weights.write_text("one")
    assert make(demo).tag == forced.tag
    assert str(bentoml.models.get("demo-text").tag) == forced.tag
    assert len(writes) == 3
    assert first.metadata["source"] == "demo_models.text"
    assert not [p for p in writes if p.exists()]
