"""The handlers of `POST /tasks/{task}`, which `api.app` mounts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from pydantic import BaseModel

from api.http.context import current_request
from api.models import task_schemas as schemas
from api.models.served import ServedModels


class TaskRoute(NamedTuple):
    """The request, the response and the handler of a route."""

    body: type[schemas.TaskBody]
    response: type[schemas.TaskResponse]
    handle: Callable[[ServedModels, bytes], Awaitable[BaseModel]]
    """Takes the body's bytes."""


def _pipeline_route(task: str, pipeline: schemas.Pipeline) -> TaskRoute:
    async def handle(served: ServedModels, content: bytes) -> BaseModel:
        body = pipeline.body.parse(content)
        model = served.task(task)
        model.require(body.model)
        findings = await model.run(body.requests())
        return pipeline.to_response(current_request().request_id, model.name, findings)

    return TaskRoute(pipeline.body, pipeline.response, handle)


async def _chat(served: ServedModels, content: bytes) -> schemas.ConversationalResponse:
    """Transformers has no conversational pipeline any more: a text model generates the response."""
    body = schemas.ConversationalBody.parse(content)
    model = served.chat
    model.require(body.model)
    sampling = body.sampling(max_new_tokens=body.max_new_tokens, min_new_tokens=None, logprobs=None)
    generation = await model.generate([body.prompt()], sampling)
    [output] = await generation.collect()
    return schemas.ConversationalResponse(
        request_id=current_request().request_id,
        model=model.name,
        generated_text=output.text,
        past_user_inputs=[*body.past_user_inputs, body.text],
        generated_responses=[*body.generated_responses, output.text],
    )


ROUTES = {task: _pipeline_route(task, pipeline) for task, pipeline in schemas.PIPELINES.items()} | {
    "conversational": TaskRoute(schemas.ConversationalBody, schemas.ConversationalResponse, _chat),
}
"""The routes by task, which is the last part of their path."""
