"""The migration guides tell the truth: what they say is run prints what they promise."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest

from model_store_scripts.demo_image.build import write_demo_image_model
from model_store_scripts.demo_text.build import write_demo_text_model
from tests.support.archives import accelerate_archive, deepspeed_archive, mii_archive
from tests.support.models import write_model
from tests.support.readme import ROOT, Example, examples
from tests.support.server import Server, environment


def follow(guide: str, workdir: Path) -> None:
    """Run a guide's blocks one after the other, in a folder that has what it speaks of."""
    home = workdir / "home"
    variables = {"MII_CACHE_PATH": str(workdir / "cache")}
    url = ""
    with ExitStack() as stack:
        for example in examples(ROOT / "docs" / guide):
            if example.serves:
                chosen = variables | served_by(example)
                url = stack.enter_context(Server(home, chosen)).url
            else:
                example.check(url=url, cwd=workdir, env=environment(home, **variables))


def served_by(example: Example) -> dict[str, str]:
    """The variables of `NAME=VALUE ... bentoml serve . --port N`, and nothing else than that."""
    *chosen, bentoml, serve, target, option, port = shlex.split(example.code)
    assert (bentoml, serve, target, option) == ("bentoml", "serve", ".", "--port")
    assert port in ("3000", "8080")
    return dict(variable.split("=", 1) for variable in chosen)


def test_from_torchserve(tmp_path: Path) -> None:
    text, image = tmp_path / "text", tmp_path / "image"
    write_demo_text_model(text)
    write_demo_image_model(image)
    for made in (
        accelerate_archive(tmp_path / "bloom", text),
        deepspeed_archive(tmp_path / "opt", text),
        mii_archive(tmp_path / "stable-diffusion", image),
    ):
        made.rename(tmp_path / made.name)
    (tmp_path / "input.txt").write_text("Once upon a time in Porto Lume, Fenna the fox")
    follow("torchserve.md", tmp_path)


def test_from_mii(tmp_path: Path) -> None:
    pytest.importorskip("mii")
    write_model("llama", tmp_path / "my-model")
    section = {"mode": "persistent", "deployment_name": "kept"}
    (tmp_path / "persistent.json").write_text(json.dumps({"engine": "mii", "mii": section}))
    follow("mii.md", tmp_path)


@pytest.mark.parametrize("guide", ["torchserve.md", "mii.md"])
def test_a_guide_is_run(guide: str) -> None:
    found = examples(ROOT / "docs" / guide)
    assert len(found) > 4
    assert sum(example.serves for example in found) == 1
