"""From a task to the program that runs it in a rank, on the Accelerate engine.

Imported in rank processes only.
"""

from __future__ import annotations

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
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.engines.accelerate import load_model
from runners.hf.models import context_length, devices, load_tokenizer, loading
from runners.rank.program import RankContext, RankProgram
from runners.tasks.answering import QuestionAnswering
from runners.tasks.pipelines import PIPELINES
from runners.tasks.program import Task, TaskProgram

HEADS = {
    "fill-mask": AutoModelForMaskedLM,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "text-classification": AutoModelForSequenceClassification,
}


def load_program(context: RankContext) -> RankProgram:
    """The rank program of a task. Raises: ConfigError."""
    config = context.config
    assert isinstance(config, TaskConfig)  # noqa: S101 - `create_runner` chose this program
    torch.set_num_threads(context.num_threads)
    context.progress(RunnerState.LOADING, f"loading weights from {config.name}")
    tokenizer = load_tokenizer(config.model_path)
    model = load_model(on_accelerate(config), context.work_dir, HEADS[config.task])
    longest = min(positions(model), tokenizer.model_max_length, config.max_length or 2**31)
    info = ModelInfo(
        architecture=type(model).__name__,
        engine=config.engine,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        devices=devices(model),
        max_context=longest,
        vocab_size=model.config.get_text_config().vocab_size,
        max_kv_tokens=longest,
        has_chat_template=False,
    )
    with loading(f"the {config.task} pipeline of {config.name}"):
        task = _task(config.task, model, tokenizer, longest)
    return TaskProgram(info, task, batch_size=config.max_batch_size, emit=context.emit)


def on_accelerate(config: TaskConfig) -> AccelerateTaskConfig:
    """The config of a model that runs as on Accelerate, whatever engine it names."""
    if isinstance(config, AccelerateTaskConfig):
        return config
    fields = config.model_dump(include=set(TaskConfig.model_fields), exclude={"engine"})
    return AccelerateTaskConfig(**fields | {"tensor_parallel": 1})


def _task(name: str, model: PreTrainedModel, tokenizer: Any, longest: int) -> Task:
    if name == "question-answering":
        return QuestionAnswering(model, tokenizer, longest)
    return PIPELINES[name](model, tokenizer, longest)


def positions(model: PreTrainedModel) -> int:
    """How many tokens a model can tell the places of.

    RoBERTa and its kin count from behind the padding token's id on.
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
