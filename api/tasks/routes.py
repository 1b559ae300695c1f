"""What `POST /tasks/{task}` does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from pydantic import BaseModel

from api.http.context import current_request
from api.models import task_schemas as schemas
from api.models.served import Served


class TaskRoute(NamedTuple):
    """One route: its body, its answer, and its handler."""

    body: type[schemas.TaskBody]
    answer: type[schemas.TaskAnswer]
    handle: Callable[[Served, bytes], Awaitable[BaseModel]]


def _route(task: str, pipeline: schemas.Pipeline) -> TaskRoute:
    async def handle(served: Served, content: bytes) -> BaseModel:
        body = pipeline.body.parse(content)
        model = served.task(task)
        model.require(body.model)
        findings = await model.run(body.requests())
        return pipeline.to_answer(current_request().request_id, model.name, findings)

    return TaskRoute(pipeline.body, pipeline.answer, handle)


async def _converse(served: Served, content: bytes) -> schemas.ConversationalAnswer:
    """A chat with a text model: transformers no longer has a conversational pipeline."""
    body = schemas.ConversationalBody.parse(content)
    model = served.conversing
    model.require(body.model)
    sampling = body.sampling(max_new_tokens=body.max_new_tokens, min_new_tokens=None, logprobs=None)
    generation = await model.generate([body.prompt()], sampling)
    [output] = await generation.collect()
    return schemas.ConversationalAnswer(
        request_id=current_request().request_id,
        model=model.name,
        generated_text=output.text,
        past_user_inputs=[*body.past_user_inputs, body.text],
        generated_responses=[*body.generated_responses, output.text],
    )


ROUTES = {task: _route(task, pipeline) for task, pipeline in schemas.PIPELINES.items()} | {
    "conversational": TaskRoute(
        schemas.ConversationalBody, schemas.ConversationalAnswer, _converse
    ),
}
"""The last part of the path to its route."""
