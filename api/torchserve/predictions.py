"""Responses of `/predictions`, in the format of TorchServe's example handlers.

A text model returns the prompt and its continuation as plain text. An image model returns the
pixels as nested lists of height x width x 3, or a file if the client accepts an image type. The
model of a pipeline task returns the outputs of `/tasks`.
"""

from __future__ import annotations

import json

from starlette.responses import Response

from api.http.context import current_request
from api.http.image_files import Format, as_file, as_nested_lists, media_type
from api.http.schemas import ImageFields, MinTokenCount, SamplingFields, Side, TokenCount
from api.models.images import ImageModel
from api.models.task_schemas import PIPELINES
from api.models.tasks import TaskModel
from api.models.text import TextModel
from api.torchserve.bodies import Input

FILE_FORMATS: dict[str, Format] = {
    "image/png": "png",
    "image/*": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}


class TextOptions(SamplingFields):
    """Options next to a text prompt, as in `/generate`."""

    max_new_tokens: TokenCount | None = None
    """Maximum number of generated tokens. Default: that of the model's configuration."""
    min_new_tokens: MinTokenCount | None = None
    """The end token is not sampled before this many tokens. Default: 0."""


class ImageOptions(ImageFields):
    """Options next to an image prompt, as in `/generate_image`."""

    height: Side | None = None
    """In pixels."""
    width: Side | None = None
    """In pixels."""


async def predict(
    model: TextModel | TaskModel | ImageModel, request_input: Input, accept: str
) -> Response:
    """Run a model on an input. Raises: as the model's native route.

    `accept`: the request's `Accept` header.
    """
    match model:
        case TextModel():
            return await _generate_text(model, request_input)
        case ImageModel():
            return await _generate_image(model, request_input, accept)
        case TaskModel():
            return await _run_task(model, request_input)


async def _generate_text(model: TextModel, request_input: Input) -> Response:
    options = TextOptions.checked(request_input.options)
    sampling = options.sampling(
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        logprobs=None,
    )
    generation = await model.generate([request_input.text], sampling)
    [output] = await generation.collect()
    return Response(request_input.text + output.text, media_type="text/plain")


async def _generate_image(model: ImageModel, request_input: Input, accept: str) -> Response:
    options = ImageOptions.checked({**request_input.options, "prompt": request_input.text})
    requests = options.to_requests(1, height=options.height, width=options.width)
    generation = await model.generate(requests)
    [result] = await generation.collect()
    headers = {"X-Seed": str(result.seed)}
    if (file_format := _accepted_format(accept)) is not None:
        content = await as_file(result.image, file_format)
        return Response(content, headers=headers, media_type=media_type(file_format))
    content = await as_nested_lists(result.image)
    return Response(content, headers=headers, media_type="application/json")


def _accepted_format(accept: str) -> Format | None:
    """The first image format that an `Accept` header names."""
    media_types = (part.partition(";")[0].strip().lower() for part in accept.split(","))
    return next((FILE_FORMATS[name] for name in media_types if name in FILE_FORMATS), None)


async def _run_task(model: TaskModel, request_input: Input) -> Response:
    # The input of question-answering is an object, question and context; elsewhere it is a text.
    is_object = model.task == "question-answering"
    values = (
        request_input.fields
        if is_object
        else {**request_input.options, "inputs": request_input.text}
    )
    pipeline = PIPELINES[model.task]
    body = pipeline.body.checked(values)
    findings = await model.run(body.requests())
    response = pipeline.to_response(current_request().request_id, model.name, findings)
    outputs = response.model_dump(mode="json", include={"outputs"}, exclude_none=True)["outputs"]
    return Response(json.dumps(outputs if is_object else outputs[0]), media_type="application/json")
