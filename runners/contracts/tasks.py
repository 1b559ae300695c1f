"""Requests, results and the interface of models for tasks of one forward, such as fill-mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import msgspec

from runners.contracts.runner import Runner
from runners.contracts.text import ModelInfo

PipelineTask = Literal[
    "fill-mask", "token-classification", "question-answering", "text-classification"
]
"""The tasks, beside generation, of MII's legacy releases: one forward each, nothing generated."""
PIPELINE_TASKS: tuple[str, ...] = get_args(PipelineTask)
TEXT_TASKS = ("text-generation", "conversational")
"""The tasks of a text model; a conversation is a chat that goes on."""
IMAGE_TASK: Literal["text-to-image"] = "text-to-image"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Options of a request; each task has some of them, the others stay None."""

    top_k: int | None = None
    """How many findings, best first; None: the default of `transformers.pipeline`."""
    targets: list[str] | None = None
    """fill-mask: the only tokens to choose among."""
    aggregation_strategy: str | None = None
    """token-classification: how tokens are merged into entities."""
    ignore_labels: list[str] | None = None
    """token-classification: labels that are left out."""
    function_to_apply: str | None = None
    """text-classification: from logits to scores; None: as the model's config says."""
    max_answer_len: int = 15
    """question-answering: in tokens."""
    handle_impossible_answer: bool = False
    """question-answering: whether an empty answer may be the best."""


class TaskRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One input of a task."""

    request_id: str
    text: str
    """The text to fill, label or classify, or the context of a question."""
    question: str | None = None
    """question-answering only."""
    options: TaskOptions = TaskOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result for an input; each task sets its own fields."""

    score: float
    """A probability, unless `function_to_apply` says otherwise."""
    label: str | None = None
    """Of a text, a token or an entity."""
    text: str | None = None
    """The token that fills the mask, the word that has the label, or the answer."""
    token_id: int | None = None
    """fill-mask: the token."""
    sequence: str | None = None
    """fill-mask: the whole text with it."""
    mask: int = 0
    """fill-mask: the index of the mask."""
    index: int | None = None
    """token-classification: the token's position, if tokens are not merged."""
    start: int | None = None
    """The first character in the input's text."""
    end: int | None = None
    """The character after the last."""


class TaskResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All findings for one input: the only event of its request."""

    request_id: str
    findings: list[Finding]

    @property
    def finished(self) -> bool:
        """Always: nothing follows."""
        return True


class TaskRunner(Runner[TaskRequest, TaskResult], Protocol):
    """A model for one of the tasks."""

    @property
    def info(self) -> ModelInfo | None:
        """What the rank loaded; None before it was ready once."""
        ...
