"""Bodies and answers of the pipeline tasks, for `/tasks/{task}` and TorchServe's `/predictions`.

Where `transformers.pipeline` has a name, it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field

from api.http.schemas import SamplingFields, TokenCount, WireModel
from runners.contracts.errors import InvalidRequest
from runners.contracts.tasks import Finding, TaskOptions, TaskRequest
from runners.contracts.text import ChatMessage, ChatPrompt

MAX_INPUTS = 128
MAX_TOP_K = 1000
MAX_TURNS = 2048

Text = Annotated[str, Field(min_length=1, max_length=200_000)]
Count = Annotated[int, Field(ge=1, le=MAX_TOP_K)]
Word = Annotated[str, Field(min_length=1, max_length=256)]


class TaskBody(WireModel):
    """What all bodies have."""

    model: Annotated[str, Field(max_length=256)] | None = None
    """The model's name, as `/v1/models` lists it. Default: the one this server holds."""


class PipelineBody(TaskBody):
    """A body for a pipeline: one input or several, each answered by itself."""

    inputs: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    """A text, or several."""

    def options(self) -> TaskOptions:
        """What the request wants of its answers."""
        return TaskOptions()

    def requests(self) -> list[TaskRequest]:
        """One for each input; their ids come later."""
        texts = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        options = self.options()
        return [TaskRequest(request_id="", text=text, options=options) for text in texts]


class FillMaskBody(PipelineBody):
    """Fill the mask tokens (`[MASK]` for BERT, `<mask>` for RoBERTa) of a text."""

    top_k: Count | None = None
    """How many candidates for each mask. Default: 5."""
    targets: Annotated[list[Word], Field(min_length=1, max_length=MAX_TOP_K)] | None = None
    """The only tokens to choose among."""

    def options(self) -> TaskOptions:
        """What the request wants of its answers."""
        return TaskOptions(top_k=self.top_k, targets=self.targets)


class TokenClassificationBody(PipelineBody):
    """Label the tokens of a text."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None
    """How tokens are put together to entities. Default: `none`, each by itself."""
    ignore_labels: Annotated[list[Word], Field(max_length=MAX_TOP_K)] | None = None
    """Labels that are left out. Default: `O`."""

    def options(self) -> TaskOptions:
        """What the request wants of its answers."""
        return TaskOptions(
            aggregation_strategy=self.aggregation_strategy, ignore_labels=self.ignore_labels
        )


class TextClassificationBody(PipelineBody):
    """Label a text as a whole."""

    top_k: Count | None = None
    """How many labels, the best first. Default: 1."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """From logits to scores. Default: as the model's config says."""

    def options(self) -> TaskOptions:
        """What the request wants of its answers."""
        return TaskOptions(top_k=self.top_k, function_to_apply=self.function_to_apply)


class QuestionAnsweringBody(TaskBody):
    """Find the answer to a question in a text."""

    question: Annotated[str, Field(min_length=1, max_length=10_000)]
    context: Text
    """Where the answer is; longer than the model's context, it is read in windows."""
    top_k: Count | None = None
    """How many answers at most. Default: 1."""
    max_answer_len: Annotated[int, Field(ge=1, le=512)] = 15
    """In tokens."""
    handle_impossible_answer: bool = False
    """Whether an empty answer may be the best."""

    def requests(self) -> list[TaskRequest]:
        """The one request; its id comes later."""
        options = TaskOptions(
            top_k=self.top_k,
            max_answer_len=self.max_answer_len,
            handle_impossible_answer=self.handle_impossible_answer,
        )
        request = TaskRequest(
            request_id="", text=self.context, question=self.question, options=options
        )
        return [request]


Turn = Annotated[str, Field(min_length=1, max_length=200_000)]
Turns = Annotated[
    list[Annotated[str, Field(max_length=200_000)]], Field(max_length=MAX_TURNS, fail_fast=True)
]


class ConversationalBody(TaskBody, SamplingFields):
    """Go on with a conversation: a text model with a chat template answers."""

    text: Turn
    """What the user says now."""
    past_user_inputs: Turns = Field(default=[])
    """What the user said before."""
    generated_responses: Turns = Field(default=[])
    """What the model answered to each of them."""
    max_new_tokens: TokenCount | None = None
    """Upper bound on generated tokens. Default: the server's."""

    def prompt(self) -> ChatPrompt:
        """The conversation so far. Raises: InvalidRequest."""
        said, answered = self.past_user_inputs, self.generated_responses
        if len(said) != len(answered):
            raise InvalidRequest(
                f"has {len(answered)} texts, but past_user_inputs has {len(said)}: each needs its "
                "answer",
                field="generated_responses",
            )
        turns = [
            ChatMessage(role=role, content=content)
            for pair in zip(said, answered, strict=True)
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        return ChatPrompt(messages=[*turns, ChatMessage(role="user", content=self.text)])


class TaskAnswer(BaseModel):
    """What all answers have."""

    request_id: str
    model: str


class FilledToken(BaseModel):
    """A candidate for a mask."""

    mask: int
    """Which of the text's masks, from 0."""
    score: float
    token: int
    token_str: str
    sequence: str
    """The text with it."""


class Entity(BaseModel):
    """A token or, put together, an entity."""

    label: str
    """`entity` or `entity_group` of the pipeline."""
    score: float
    word: str
    start: int | None = None
    """The first character in the text."""
    end: int | None = None
    """The character after the last."""
    index: int | None = None
    """The token's place, unless put together."""


class Label(BaseModel):
    """A label of a text."""

    label: str
    score: float


class Answer(BaseModel):
    """A part of the context; empty: there is no answer."""

    answer: str
    score: float
    start: int
    """The first character in the context."""
    end: int
    """The character after the last."""


class FillMaskAnswer(TaskAnswer):
    """Candidates for the masks of each input."""

    outputs: list[list[FilledToken]]


class TokenClassificationAnswer(TaskAnswer):
    """Labelled tokens or entities of each input."""

    outputs: list[list[Entity]]


class TextClassificationAnswer(TaskAnswer):
    """Labels of each input."""

    outputs: list[list[Label]]


class QuestionAnsweringAnswer(TaskAnswer):
    """Answers, the best first."""

    outputs: list[Answer]


class ConversationalAnswer(TaskAnswer):
    """What the model says, and the conversation with it, ready for the next `text`."""

    generated_text: str
    past_user_inputs: list[str]
    generated_responses: list[str]


def fill_mask(request_id: str, model: str, found: list[list[Finding]]) -> FillMaskAnswer:
    """Findings as an answer."""
    outputs = [
        [
            FilledToken(
                mask=f.mask,
                score=f.score,
                token=f.token_id or 0,
                token_str=f.text or "",
                sequence=f.sequence or "",
            )
            for f in each
        ]
        for each in found
    ]
    return FillMaskAnswer(request_id=request_id, model=model, outputs=outputs)


def token_classification(
    request_id: str, model: str, found: list[list[Finding]]
) -> TokenClassificationAnswer:
    """Findings as an answer."""
    outputs = [
        [
            Entity(
                label=f.label or "",
                score=f.score,
                word=f.text or "",
                start=f.start,
                end=f.end,
                index=f.index,
            )
            for f in each
        ]
        for each in found
    ]
    return TokenClassificationAnswer(request_id=request_id, model=model, outputs=outputs)


def text_classification(
    request_id: str, model: str, found: list[list[Finding]]
) -> TextClassificationAnswer:
    """Findings as an answer."""
    outputs = [[Label(label=f.label or "", score=f.score) for f in each] for each in found]
    return TextClassificationAnswer(request_id=request_id, model=model, outputs=outputs)


def question_answering(
    request_id: str, model: str, found: list[list[Finding]]
) -> QuestionAnsweringAnswer:
    """Findings as an answer."""
    outputs = [
        Answer(answer=f.text or "", score=f.score, start=f.start or 0, end=f.end or 0)
        for f in found[0]
    ]
    return QuestionAnsweringAnswer(request_id=request_id, model=model, outputs=outputs)


class Pipeline(NamedTuple):
    """The body of a task's request, and how its findings become an answer."""

    body: type[PipelineBody | QuestionAnsweringBody]
    answer: type[TaskAnswer]
    to_answer: Callable[[str, str, list[list[Finding]]], TaskAnswer]


PIPELINES = {
    "fill-mask": Pipeline(FillMaskBody, FillMaskAnswer, fill_mask),
    "token-classification": Pipeline(
        TokenClassificationBody, TokenClassificationAnswer, token_classification
    ),
    "question-answering": Pipeline(
        QuestionAnsweringBody, QuestionAnsweringAnswer, question_answering
    ),
    "text-classification": Pipeline(
        TextClassificationBody, TextClassificationAnswer, text_classification
    ),
}
"""The pipeline tasks by name."""
