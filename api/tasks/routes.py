"""What `POST /tasks/{task}` does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from pydantic import BaseModel

from api.http.context import current_request
from api.models.served import Served
from api.tasks import schemas
from runners.contracts.tasks import Finding


class TaskRoute(NamedTuple):
    """One task: its body, its answer, and what comes between."""

    body: type[schemas.TaskBody]
    answer: type[schemas.TaskAnswer]
    handle: Callable[[Served, bytes], Awaitable[BaseModel]]


def _pipeline(
    task: str,
    body: type[schemas.PipelineBody] | type[schemas.QuestionAnsweringBody],
    answer: type[schemas.TaskAnswer],
    answered: Callable[[str, str, list[list[Finding]]], BaseModel],
) -> TaskRoute:
    async def handle(served: Served, content: bytes) -> BaseModel:
        asked = body.parse(content)
        model = served.task(task)
        model.require(asked.model)
        found = await model.run(asked.requests())
        return answered(current_request().request_id, model.name, found)

    return TaskRoute(body, answer, handle)


async def _converse(served: Served, content: bytes) -> schemas.ConversationalAnswer:
    """The chat path of a text model: transformers has no conversational pipeline any more."""
    asked = schemas.ConversationalBody.parse(content)
    model = served.conversing
    model.require(asked.model)
    sampling = asked.sampling(
        max_new_tokens=asked.max_new_tokens, min_new_tokens=None, logprobs=None
    )
    generation = await model.generate([asked.prompt()], sampling)
    [output] = await generation.collect()
    return schemas.ConversationalAnswer(
        request_id=current_request().request_id,
        model=model.name,
        generated_text=output.text,
        past_user_inputs=[*asked.past_user_inputs, asked.text],
        generated_responses=[*asked.generated_responses, output.text],
    )


ROUTES = {
    "fill-mask": _pipeline(
        "fill-mask", schemas.FillMaskBody, schemas.FillMaskAnswer, schemas.fill_mask
    ),
    "token-classification": _pipeline(
        "token-classification",
        schemas.TokenClassificationBody,
        schemas.TokenClassificationAnswer,
        schemas.token_classification,
    ),
    "question-answering": _pipeline(
        "question-answering",
        schemas.QuestionAnsweringBody,
        schemas.QuestionAnsweringAnswer,
        schemas.question_answering,
    ),
    "text-classification": _pipeline(
        "text-classification",
        schemas.TextClassificationBody,
        schemas.TextClassificationAnswer,
        schemas.text_classification,
    ),
    "conversational": TaskRoute(
        schemas.ConversationalBody, schemas.ConversationalAnswer, _converse
    ),
}
"""The last part of the path to what it does."""
