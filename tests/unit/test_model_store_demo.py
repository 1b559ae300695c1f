"""The demo models: made once, made anew when their recipe changes, else quickly left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bentoml
import pytest
import transformers as tf

from model_store_scripts import make_demo_models
from model_store_scripts.make_demo_models import Demo, make
from tests.support.models import write_model


def test_made_once_and_again_when_the_recipe_changes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_demo_models, "HERE", tmp_path)
    recipe = tmp_path / "demo" / "weights" / "numbers"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("one")
    writes: list[Path] = []

    def write(target: Path) -> None:
        writes.append(write_model("llama", target))

    demo = Demo("text", "demo-text", "demo", ("weights",), write)
    first = make(demo)
    assert first.new
    again = make(demo)
    assert (again.tag, again.new, len(writes)) == (first.tag, False, 1)
    forced = make(demo, force=True)
    assert (forced.new, forced.tag != first.tag) == (True, True)
    recipe.write_text("two")
    second = make(demo)
    assert second.new
    recipe.write_text("one")
    assert make(demo).tag == forced.tag
    assert str(bentoml.models.get("demo-text").tag) == forced.tag
    assert len(writes) == 3
    assert first.metadata["source"] == "model_store_scripts.demo"
    assert not [p for p in writes if p.exists()]


def test_the_demo_text_model(tmp_path: Path) -> None:
    script = (
        "import sys; from model_store_scripts.make_demo_models import main; "
        "code = main(['--text']); print('torch' in sys.modules); sys.exit(code)"
    )
    env = os.environ | {"BENTOML_HOME": str(tmp_path)}
    for text, torch in (("imported", "True"), ("already in the store, unchanged", "False")):
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        made, _, imported_torch = done.stdout.splitlines()
        assert made.startswith("demo-text:")
        assert text in made
        assert imported_torch == torch
    folder = tmp_path / "models" / made.split()[0].replace(":", "/") / "model"
    assert tf.AutoTokenizer.from_pretrained(folder).chat_template
    assert tf.AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
