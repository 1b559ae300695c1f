"""What the HTTP layer, the channel and the engines tell each other about tasks but generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from runners.contracts.runner import Runner
from runners.contracts.text import ModelInfo

PipelineTask = Literal[
    "fill-mask", "token-classification", "question-answering", "text-classification"
]
"""The tasks, beside generation, of MII's legacy releases: one forward each, nothing generated."""
PIPELINE_TASKS: tuple[str, ...] = get_args(PipelineTask)
TEXT_TASKS = ("text-generation", "conversational")
"""What a text model does; a conversation is a chat, continued."""
IMAGE_TASK: Literal["text-to-image"] = "text-to-image"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What a request wants of its answer; each task has its own of them, the others stay None."""

    top_k: int | None = None
    """How many findings, best first; None: as `transformers.pipeline` has it."""
    targets: list[str] | None = None
    """fill-mask: the only tokens to choose among."""
    aggregation_strategy: str | None = None
    """token-classification: how tokens are put together to entities."""
    ignore_labels: list[str] | None = None
    """token-classification: what is no finding."""
    function_to_apply: str | None = None
    """text-classification: from logits to scores; None: as the model's config says."""
    max_answer_len: int = 15
    """question-answering: in tokens."""
    handle_impossible_answer: bool = False
    """question-answering: whether an empty answer may be the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """One input of a task."""

    request_id: str
    text: str
    """What to fill, to label, to classify, or to find the answer in."""
    question: str | None = None
    """question-answering only."""
    options: TaskOptions = field(default_factory=TaskOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result for an input; each task sets what it finds."""

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
    place: int = 0
    """fill-mask: which of the masks."""
    index: int | None = None
    """token-classification: the token's place in its sequence, if tokens are not put together."""
    start: int | None = None
    """The first character in the input's text."""
    end: int | None = None
    """The character after the last."""


class TaskRunner(Runner, Protocol):
    """A model for one of the tasks."""

    @property
    def task(self) -> str:
        """What the model does, a `PipelineTask`."""
        ...

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        ...

    async def run(self, request: TaskRequest) -> list[Finding]:
        """Wait for the answer to one input; a caller that is cancelled takes it out of the queue.

        Raises: InvalidRequest, ContextLengthExceeded, RunnerUnavailable, EngineFailure.
        """
        ...
