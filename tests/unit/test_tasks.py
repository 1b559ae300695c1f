"""Which task a model is for, what runs it, and how long an input may be."""

from __future__ import annotations

import json
from pathlib import Path

import bentoml
import pytest
import transformers as tf

from model_store_scripts import import_model
from runners import create_runner, create_task_runner
from runners.config import validate
from runners.config_files import load_setup_config
from runners.contracts.tasks import PipelineTask
from runners.errors import ConfigError, EngineUnavailable
from runners.task_programs import positions
from runners.task_runner import on_accelerate
from tests.support.model_store import store_at
from tests.support.task_models import HEADS, POSITIONS, write_task_model


@pytest.mark.parametrize("task", list(HEADS))
def test_an_imported_model_is_for_the_task_of_its_head(task: PipelineTask, tmp_path: Path) -> None:
    folder = write_task_model(task, tmp_path / "own")
    assert load_setup_config(folder, name="m")[0].task == task
    with store_at(tmp_path / "home"):
        assert import_model.main([str(folder), "--name", "tiny"]) == 0
        model = bentoml.models.get("tiny")
        config, warnings = load_setup_config(Path(model.path), name="tiny")
    assert (config.task, config.engine, warnings) == (task, "accelerate", [])
    assert model.info.labels["task"] == task


def test_a_head_for_another_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_task_model("fill-mask", tmp_path / "own")
    with store_at(tmp_path / "home"):
        command = [str(folder), "--name", "tiny", "--task", "text-classification"]
        assert import_model.main(command) == 1
    assert "is for fill-mask, not for text-classification" in capsys.readouterr().err


def test_the_forerunners_file_runs_on_accelerate(tmp_path: Path) -> None:
    folder = write_task_model("fill-mask", tmp_path / "own")
    setup = {"model_name": "bert", "task": "fill-mask", "mii_config": {"dtype": "fp32"}}
    (folder / "setup_config.json").write_text(json.dumps(setup))
    config, _ = load_setup_config(folder, name="m")
    assert (config.engine, config.task) == ("mii", "fill-mask")
    placed = on_accelerate(config)
    assert (placed.engine, placed.task, placed.dtype) == ("accelerate", "fill-mask", "float32")
    assert create_task_runner(config).task == "fill-mask"


def test_engines() -> None:
    given = {"name": "m", "model_path": "."}
    config = validate({"engine": "deepspeed", "task": "fill-mask", **given})
    with pytest.raises(EngineUnavailable, match="runs on: accelerate, mii"):
        create_task_runner(config)
    with pytest.raises(ConfigError):
        create_runner(config)
    for engine in ("accelerate", "deepspeed", "mii"):
        create_runner(validate({"engine": engine, "task": "conversational", **given}))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_positions(family: str, tmp_path: Path) -> None:
    folder = write_task_model("fill-mask", tmp_path / family, family=family)
    model = tf.AutoModelForMaskedLM.from_pretrained(folder)
    assert positions(model) == POSITIONS
