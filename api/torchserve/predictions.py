"""What `/predictions` answers, in the form in which the example handlers did.

Text: the prompt and what follows it, as plain text. A picture: its pixels as nested lists of height
x width x 3, or, if the client accepts an image type, a file. A task of `/tasks`: its outputs.
"""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field
from starlette.responses import Response

from api.http.context import current_request
from api.http.image_files import Format, as_file, as_nested_lists, media_type
from api.http.image_schemas import PaintingFields, Side
from api.http.schemas import SamplingFields, TokenCount
from api.models.images import ImageModel
from api.models.task_schemas import PIPELINES
from api.models.tasks import TaskModel
from api.models.text import TextModel
from api.torchserve.bodies import Input

FILES: dict[str, Format] = {
    "image/png": "png",
    "image/*": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}


class TextOptions(SamplingFields):
    """What may stand beside a prompt, as in `/generate`."""

    max_new_tokens: TokenCount | None = None
    """Upper bound on generated tokens. Default: the server's."""
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    """The end token is not taken before this many tokens. Default: 0."""


class PaintingOptions(PaintingFields):
    """What may stand beside a prompt, as in `/generate_image`."""

    height: Side | None = None
    """In pixels."""
    width: Side | None = None
    """In pixels."""


async def predict(model: TextModel | TaskModel | ImageModel, asked: Input, accept: str) -> Response:
    """Answer an input. Raises: what its model's own route does."""
    match model:
        case TextModel():
            return await _continue(model, asked)
        case ImageModel():
            return await _paint(model, asked, accept)
        case TaskModel():
            return await _run_task(model, asked)


async def _continue(model: TextModel, asked: Input) -> Response:
    options = TextOptions.checked(asked.options)
    sampling = options.sampling(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        logprobs=None,
    )
    generation = await model.generate([asked.text], sampling)
    [output] = await generation.collect()
    return Response(asked.text + output.text, media_type="text/plain")


async def _paint(model: ImageModel, asked: Input, accept: str) -> Response:
    options = PaintingOptions.checked({**asked.options, "prompt": asked.text})
    painting = await model.paint(options.wish(options.height, options.width), seed=options.seed)
    [painted] = await painting.collect()
    headers = {"X-Seed": str(painted.seed)}
    if (file := _file_wanted(accept)) is not None:
        content = await as_file(painted.picture, file)
        return Response(content, headers=headers, media_type=media_type(file))
    content = await as_nested_lists(painted.picture)
    return Response(content, headers=headers, media_type="application/json")


def _file_wanted(accept: str) -> Format | None:
    """The first kind of picture file that a client's `Accept` names."""
    kinds = (each.partition(";")[0].strip().lower() for each in accept.split(","))
    return next((FILES[kind] for kind in kinds if kind in FILES), None)


async def _run_task(model: TaskModel, asked: Input) -> Response:
    # A question comes with its context, where all others have a text.
    inputs = asked.content if isinstance(asked.content, dict) else {"inputs": asked.text}
    pipeline = PIPELINES[model.task]
    body = pipeline.body.checked({**asked.options, **inputs})
    findings = await model.run(body.requests())
    answer = pipeline.to_answer(current_request().request_id, model.name, findings)
    outputs = answer.model_dump(mode="json", include={"outputs"}, exclude_none=True)["outputs"]
    one = outputs[0] if "inputs" in inputs else outputs
    return Response(json.dumps(one), media_type="application/json")
