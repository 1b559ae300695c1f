"""Loads a model for a task of one forward, on Accelerate, and makes its rank program.

Called by the worker, in rank processes.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from runners.config.base import TaskConfig
from runners.config.model import AccelerateTaskConfig
from runners.config.reading import read_json
from runners.config.torchserve import INDEX_TO_NAME
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.engines.accelerate import load_model
from runners.hf.dtypes import cast_to_float32, computes_in_float32, log_dtypes, weight_dtype
from runners.hf.models import context_length, devices, load_tokenizer, loading
from runners.protocol.process import give_back_memory
from runners.rank.program import RankContext, RankProgram
from runners.tasks.pipelines import PIPELINES
from runners.tasks.program import Task, TaskProgram
from runners.tasks.question_answering import QuestionAnswering

HEADS = {
    "fill-mask": AutoModelForMaskedLM,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "text-classification": AutoModelForSequenceClassification,
}


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a model for a task. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, TaskConfig)  # noqa: S101 - `create_runner` chose this program
    torch.set_num_threads(context.num_threads)
    context.progress(RunnerState.LOADING, f"loading weights from {config.name}")
    tokenizer = load_tokenizer(config.model_path)
    model = load_model(accelerate_config(config), context.work_dir, HEADS[config.task])
    if computes_in_float32(model):
        cast_to_float32(model)
        give_back_memory()
        log_dtypes(config.name, model)
    if names := label_names(config.model_path, model.config.num_labels or 0):
        labels: dict[Any, str] = dict(model.config.id2label or {})
        model.config.id2label = labels | names
    max_tokens = min(max_positions(model), tokenizer.model_max_length, config.max_length or 2**31)
    info = ModelInfo(
        architecture=type(model).__name__,
        engine=config.engine,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(weight_dtype(model)).removeprefix("torch."),
        devices=devices(model),
        max_context=max_tokens,
        vocab_size=model.config.get_text_config().vocab_size,
        max_kv_tokens=max_tokens,
        has_chat_template=False,
    )
    with loading(f"the {config.task} pipeline of {config.name}"):
        task = _make_task(config.task, model, tokenizer, max_tokens)
    return TaskProgram(info, task, batch_size=config.max_batch_size, emit=context.emit)


def accelerate_config(config: TaskConfig) -> AccelerateTaskConfig:
    """The config of a task model for Accelerate, which loads it whatever engine it names."""
    if isinstance(config, AccelerateTaskConfig):
        return config
    fields = config.model_dump(include=set(TaskConfig.model_fields), exclude={"engine"})
    return AccelerateTaskConfig(**fields | {"tensor_parallel": 1})


def label_names(folder: Path, count: int) -> dict[int, str]:
    """The labels that a model folder's `index_to_name.json` names, by index; none without it.

    Raises: ConfigError for a file of another form, or an index that the model does not have.
    """
    content = read_json(folder / INDEX_TO_NAME, INDEX_TO_NAME)
    listed = content.get("label_list")
    try:
        if listed is not None:
            listed = ast.literal_eval(listed) if isinstance(listed, str) else listed
            names = dict(enumerate(listed))
        else:
            names = {int(index): name for index, name in content.items()}
    except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
        names = {-1: ""}
    if not all(0 <= i < count and isinstance(name, str) and name for i, name in names.items()):
        raise ConfigError(
            f"{INDEX_TO_NAME} must have the name of each index from 0 to {count - 1}, or all names "
            "as label_list"
        )
    return names


def _make_task(name: str, model: PreTrainedModel, tokenizer: Any, max_tokens: int) -> Task:
    if name == "question-answering":
        return QuestionAnswering(model, tokenizer, max_tokens)
    return PIPELINES[name](model, tokenizer, max_tokens)


def max_positions(model: PreTrainedModel) -> int:
    """Maximum number of tokens that a model has position embeddings for.

    RoBERTa and related models number positions from the padding token's id plus one.
    """
    table = next(
        (
            module
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        ),
        None,
    )
    if table is None or table.padding_idx is None:
        return context_length(model.config)
    return int(table.num_embeddings - table.padding_idx - 1)
