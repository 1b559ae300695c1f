"""Requests and responses of the pipeline tasks, on `/tasks/{task}` and TorchServe's routes.

Names are those of `transformers.pipeline` where it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field
from typing_extensions import override

from api.http.context import current_request
from api.http.schemas import ModelName, SamplingFields, TokenCount, WireModel
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
    """What all bodies have in common."""

    model: ModelName | None = None
    """The model's name, as `/v1/models` lists it. Default: the model that is served."""


class PipelineBody(TaskBody):
    """One input or several, which are independent of each other."""

    inputs: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    """A text, or several."""

    def options(self) -> TaskOptions:
        """The options of all inputs."""
        return TaskOptions()

    def requests(self) -> list[TaskRequest]:
        """One request for each input."""
        texts = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        context, options = current_request(), self.options()
        return [
            TaskRequest(request_id=context.new_part_id(), text=text, options=options)
            for text in texts
        ]


class FillMaskBody(PipelineBody):
    """Fill the mask tokens (`[MASK]` for BERT, `<mask>` for RoBERTa) of a text."""

    top_k: Count | None = None
    """Candidates per mask. Default: 5."""
    targets: Annotated[list[Word], Field(min_length=1, max_length=MAX_TOP_K)] | None = None
    """The only candidates. Default: all tokens."""

    @override
    def options(self) -> TaskOptions:
        return TaskOptions(top_k=self.top_k, targets=self.targets)


class TokenClassificationBody(PipelineBody):
    """Label the tokens of a text."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None
    """How tokens are merged into entities. Default: `none`, which merges none."""
    ignore_labels: Annotated[list[Word], Field(max_length=MAX_TOP_K)] | None = None
    """Labels to leave out. Default: `O`."""

    @override
    def options(self) -> TaskOptions:
        return TaskOptions(
            aggregation_strategy=self.aggregation_strategy, ignore_labels=self.ignore_labels
        )


class TextClassificationBody(PipelineBody):
    """Label a text as a whole."""

    top_k: Count | None = None
    """Labels per input, best first. Default: 1."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """How scores are computed from logits. Default: as the model's config says."""

    @override
    def options(self) -> TaskOptions:
        return TaskOptions(top_k=self.top_k, function_to_apply=self.function_to_apply)


class QuestionAnsweringBody(TaskBody):
    """Find the answer to a question in a text."""

    question: Annotated[str, Field(min_length=1, max_length=10_000)]
    context: Text
    """The text to search. One that exceeds the model's context is split into windows."""
    top_k: Count | None = None
    """Maximum number of answers. Default: 1."""
    max_answer_len: Annotated[int, Field(ge=1, le=512)] = 15
    """Maximum length of an answer in tokens."""
    handle_impossible_answer: bool = False
    """Whether an empty answer is a candidate."""

    def requests(self) -> list[TaskRequest]:
        """The request, the only one."""
        options = TaskOptions(
            top_k=self.top_k,
            max_answer_len=self.max_answer_len,
            handle_impossible_answer=self.handle_impossible_answer,
        )
        request = TaskRequest(
            request_id=current_request().new_part_id(),
            text=self.context,
            question=self.question,
            options=options,
        )
        return [request]


Turn = Annotated[str, Field(min_length=1, max_length=200_000)]
Turns = Annotated[
    list[Annotated[str, Field(max_length=200_000)]], Field(max_length=MAX_TURNS, fail_fast=True)
]


class ConversationalBody(TaskBody, SamplingFields):
    """Continue a conversation, with a text model that has a chat template."""

    text: Turn
    """The user's new turn."""
    past_user_inputs: Turns = Field(default=[])
    """The user's earlier turns."""
    generated_responses: Turns = Field(default=[])
    """The model's responses to them."""
    max_new_tokens: TokenCount | None = None
    """Maximum number of generated tokens. Default: that of the model's configuration."""

    def prompt(self) -> ChatPrompt:
        """The conversation so far. Raises: InvalidRequest."""
        inputs, responses = self.past_user_inputs, self.generated_responses
        if len(inputs) != len(responses):
            raise InvalidRequest(
                f"must have as many texts as past_user_inputs, which has {len(inputs)}",
                field="generated_responses",
            )
        turns = [
            ChatMessage(role=role, content=content)
            for pair in zip(inputs, responses, strict=True)
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        return ChatPrompt(messages=[*turns, ChatMessage(role="user", content=self.text)])


class TaskResponse(BaseModel):
    """What all responses have in common."""

    request_id: str
    model: str


class FilledToken(BaseModel):
    """A candidate for a mask."""

    mask: int
    """Index of the mask in the text, from 0."""
    score: float
    token: int
    token_str: str
    sequence: str
    """The text with this token in place of the mask."""


class Entity(BaseModel):
    """A token, or an entity of merged tokens."""

    label: str
    """`entity` or `entity_group` of the pipeline."""
    score: float
    word: str
    start: int | None = None
    """Index of its first character in the text."""
    end: int | None = None
    """Index of the character after its last."""
    index: int | None = None
    """Index of the token, unless tokens are merged."""


class Label(BaseModel):
    """A label of a text."""

    label: str
    score: float


class Answer(BaseModel):
    """A part of the context; empty if there is no answer."""

    answer: str
    score: float
    start: int
    """Index of its first character in the context."""
    end: int
    """Index of the character after its last."""


class FillMaskResponse(TaskResponse):
    """Candidates for the masks of each input."""

    outputs: list[list[FilledToken]]


class TokenClassificationResponse(TaskResponse):
    """Labelled tokens or entities for each input."""

    outputs: list[list[Entity]]


class TextClassificationResponse(TaskResponse):
    """Labels for each input."""

    outputs: list[list[Label]]


class QuestionAnsweringResponse(TaskResponse):
    """Answers, best first."""

    outputs: list[Answer]


class ConversationalResponse(TaskResponse):
    """The model's response, and the conversation that includes it, for the next request."""

    generated_text: str
    past_user_inputs: list[str]
    generated_responses: list[str]


def fill_mask(request_id: str, model: str, findings: list[list[Finding]]) -> FillMaskResponse:
    """The response of `findings`, one list per input."""
    outputs = [
        [
            FilledToken(
                mask=finding.mask,
                score=finding.score,
                token=_integer(finding.token_id),
                token_str=finding.text or "",
                sequence=finding.sequence or "",
            )
            for finding in of_input
        ]
        for of_input in findings
    ]
    return FillMaskResponse(request_id=request_id, model=model, outputs=outputs)


def token_classification(
    request_id: str, model: str, findings: list[list[Finding]]
) -> TokenClassificationResponse:
    """The response of `findings`, one list per input."""
    outputs = [
        [
            Entity(
                label=finding.label or "",
                score=finding.score,
                word=finding.text or "",
                start=finding.start,
                end=finding.end,
                index=finding.index,
            )
            for finding in of_input
        ]
        for of_input in findings
    ]
    return TokenClassificationResponse(request_id=request_id, model=model, outputs=outputs)


def text_classification(
    request_id: str, model: str, findings: list[list[Finding]]
) -> TextClassificationResponse:
    """The response of `findings`, one list per input."""
    outputs = [
        [Label(label=finding.label or "", score=finding.score) for finding in of_input]
        for of_input in findings
    ]
    return TextClassificationResponse(request_id=request_id, model=model, outputs=outputs)


def question_answering(
    request_id: str, model: str, findings: list[list[Finding]]
) -> QuestionAnsweringResponse:
    """The response of `findings`, whose one list belongs to the one input."""
    outputs = [
        Answer(
            answer=finding.text or "",
            score=finding.score,
            start=_integer(finding.start),
            end=_integer(finding.end),
        )
        for finding in findings[0]
    ]
    return QuestionAnsweringResponse(request_id=request_id, model=model, outputs=outputs)


def _integer(value: int | None) -> int:
    return 0 if value is None else value


class Pipeline(NamedTuple):
    """A pipeline task's request and response, and how its findings become the response."""

    body: type[PipelineBody | QuestionAnsweringBody]
    response: type[TaskResponse]
    to_response: Callable[[str, str, list[list[Finding]]], TaskResponse]
    """Takes the request id, the model's name, and the findings of each input."""


PIPELINES = {
    "fill-mask": Pipeline(FillMaskBody, FillMaskResponse, fill_mask),
    "token-classification": Pipeline(
        TokenClassificationBody, TokenClassificationResponse, token_classification
    ),
    "question-answering": Pipeline(
        QuestionAnsweringBody, QuestionAnsweringResponse, question_answering
    ),
    "text-classification": Pipeline(
        TextClassificationBody, TextClassificationResponse, text_classification
    ),
}
"""The pipeline tasks by name."""
