"""Which task a model is for, what runs it, and how long an input may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bentoml
import pytest
import transformers as tf

from model_store_scripts import import_model
from runners import create_runner
from runners.config.files import load_setup_config
from runners.config.model import validate
from runners.contracts.errors import ConfigError, EngineUnavailable
from runners.contracts.tasks import PipelineTask
from runners.engines.tasks import accelerate_config, label_names, max_positions
from runners.tasks.question_answering import QuestionAnswering
from tests.support.model_store import store_at
from tests.support.task_models import CONFIGS, HEADS, POSITIONS, write_task_model


@pytest.mark.parametrize("task", list(HEADS))
def test_an_imported_model_is_for_the_task_of_its_head(task: PipelineTask, tmp_path: Path) -> None:
    folder = write_task_model(task, tmp_path / "model")
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
    folder = write_task_model("fill-mask", tmp_path / "model")
    with store_at(tmp_path / "home"):
        command = [str(folder), "--name", "tiny", "--task", "text-classification"]
        assert import_model.main(command) == 1
    assert "is for fill-mask, not for text-classification" in capsys.readouterr().err


def test_the_forerunners_file_runs_on_accelerate(tmp_path: Path) -> None:
    folder = write_task_model("fill-mask", tmp_path / "model")
    setup = {"model_name": "bert", "task": "fill-mask", "mii_config": {"dtype": "fp32"}}
    (folder / "setup_config.json").write_text(json.dumps(setup))
    config: Any = load_setup_config(folder, name="m")[0]
    assert (config.engine, config.task) == ("mii", "fill-mask")
    placed = accelerate_config(config)
    assert (placed.engine, placed.task, placed.dtype) == ("accelerate", "fill-mask", "float32")
    assert create_runner(config).task == "fill-mask"


def test_engines() -> None:
    fields = {"name": "m", "model_path": "."}
    with pytest.raises(EngineUnavailable, match="runs on: accelerate, mii"):
        validate({"engine": "deepspeed", "task": "fill-mask", **fields})
    for engine in ("accelerate", "deepspeed", "mii"):
        create_runner(validate({"engine": engine, "task": "conversational", **fields}))


@pytest.mark.parametrize(
    ("task", "section", "dropped"),
    [
        ("text-to-image", {"mii_config": {"task": "text_to_image"}}, []),
        (
            "fill-mask",
            {"mii_config": {"task": "fill-mask", "tensor_parallel": 2, "generate": {}}},
            ["mii.generate", "tensor_parallel"],
        ),
        (
            "fill-mask",
            {"replica_num": 2, "mode": "persistent"},
            ["mii.mode", "mii.replica_num"],
        ),
    ],
)
def test_mii_settings_for_generation_only_are_dropped(
    task: str, section: dict[str, object], dropped: list[str], tmp_path: Path
) -> None:
    head = {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(head))
    if task == "text-to-image":
        (tmp_path / "model_index.json").write_text("{}")
    setup = {"model_name": "a/b", "task": task} | section
    (tmp_path / "setup_config.json").write_text(json.dumps(setup))
    config, warnings = load_setup_config(tmp_path, name="m")
    assert (config.engine, config.task, config.tensor_parallel) == ("mii", task, 1)
    assert sorted(each.split(" ")[1] for each in warnings) == dropped


@pytest.mark.parametrize("task", ["text-to-image", "fill-mask"])
def test_a_task_that_the_folder_is_not_for_is_refused(task: str, tmp_path: Path) -> None:
    head = "config.json" if task == "text-to-image" else "model_index.json"
    (tmp_path / head).write_text("{}")
    (tmp_path / "setup_config.json").write_text(json.dumps({"task": task}))
    with pytest.raises(ConfigError, match=f"task: is {task}, but .* is a model for text-"):
        load_setup_config(tmp_path, name="m")


def test_a_bert_of_pretraining_is_a_fill_mask_model(tmp_path: Path) -> None:
    model = tf.BertForPreTraining(CONFIGS["bert"]())
    model.save_pretrained(tmp_path)
    assert load_setup_config(tmp_path, name="m")[0].task == "fill-mask"
    _, report = HEADS["fill-mask"].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]


def test_a_head_that_marks_no_spans_answers_no_questions(tmp_path: Path) -> None:
    folder = write_task_model("question-answering", tmp_path)
    model = HEADS["question-answering"].from_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    QuestionAnswering(model, tokenizer, POSITIONS)
    model.config.num_labels = 3
    with pytest.raises(ConfigError, match="a head of 2 labels"):
        QuestionAnswering(model, tokenizer, POSITIONS)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_positions(family: str, tmp_path: Path) -> None:
    folder = write_task_model("fill-mask", tmp_path / family, family=family)
    model = tf.AutoModelForMaskedLM.from_pretrained(folder)
    assert max_positions(model) == POSITIONS


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({}, {}),
        ({"0": "no", "1": "yes"}, {0: "no", 1: "yes"}),
        ({"1": "yes"}, {1: "yes"}),
        ({"label_list": "['O', 'B-PER']"}, {0: "O", 1: "B-PER"}),
        ({"label_list": ["O", "B-PER"]}, {0: "O", 1: "B-PER"}),
    ],
)
def test_labels_of_torchserves_file(
    content: dict[str, Any], names: dict[int, str], tmp_path: Path
) -> None:
    (tmp_path / "index_to_name.json").write_text(json.dumps(content))
    assert label_names(tmp_path, 2) == names


@pytest.mark.parametrize(
    "content",
    [
        *({"2": "x"}, {"-1": "x"}, {"a": "x"}, {"0": ["n01", "x"]}, {"0": ""}),
        *({"label_list": "[a"}, {"label_list": 3}, {"label_list": "['a', 'b', 'c']"}),
    ],
)
def test_labels_of_another_form_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "index_to_name.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"index_to_name\.json must have the name of each"):
        label_names(tmp_path, 2)
