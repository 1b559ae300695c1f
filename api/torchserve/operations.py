"""TorchServe's operations, for the document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import WithJsonSchema
from typing_extensions import TypedDict

from api.http.error_formats import TORCHSERVE, TorchServeError
from api.http.openapi import ANY_MODEL, JSON, Answer, Operation, errors, ok
from api.torchserve.models import ModelList, ModelState
from runners.contracts.errors import ContentFiltered, ModelNotServed


class Form(TypedDict, total=False):
    """A text, as one of two fields of a form."""

    data: str
    body: str


class Health(BaseModel):
    """Whether the models are served, or will be without help."""

    status: Literal["Healthy", "Unhealthy"]


Value = Annotated[Any, WithJsonSchema({"description": "Any JSON."})]
_ERRORS = errors(error_format=TORCHSERVE)
_MODEL_ERRORS = errors(ModelNotServed, error_format=TORCHSERVE)
_PREDICTION_ERRORS = errors(*ANY_MODEL, ContentFiltered, error_format=TORCHSERVE)
_INPUT = {
    "text/plain": str,
    JSON: Value,
    "multipart/form-data": Form,
    "application/x-www-form-urlencoded": Form,
}
_PREDICTION = {
    "text/plain": str,
    JSON: Value,
    "image/png": bytes,
    "image/jpeg": bytes,
    "image/webp": bytes,
}
_UNHEALTHY = Answer("A model has failed for good, or an error.", {JSON: Health | TorchServeError})


def _predictions(path: str, name: str, description: str) -> Iterator[Operation]:
    headers = {"X-Seed": "The seed that generates an image again."}
    answers = ok(_PREDICTION, headers=headers) | _PREDICTION_ERRORS
    yield Operation("post", path, name, description, answers, body=_INPUT)
    yield Operation("put", path, f"{name}_put", description, answers, body=_INPUT)


OPERATIONS = [
    *_predictions(
        "/predictions/{model_name}",
        "predictions",
        "Run a model on an input, as TorchServe's example handlers do.",
    ),
    *_predictions(
        "/predictions/{model_name}/{version}",
        "predictions_of_version",
        "The same, for a version of the model.",
    ),
    Operation(
        "get",
        "/ping",
        "ping",
        "Whether the models are served, or will be without help; `/readyz`: whether they are.",
        ok({JSON: Health}) | _ERRORS | {500: _UNHEALTHY},
    ),
    Operation("get", "/models", "models", "The served models.", ok({JSON: ModelList}) | _ERRORS),
    Operation(
        "get",
        "/models/{model_name}",
        "model",
        "The state of a model.",
        ok({JSON: list[ModelState]}) | _MODEL_ERRORS,
    ),
    Operation(
        "get",
        "/models/{model_name}/{version}",
        "model_of_version",
        "The state of a version of a model; `all`: of any version.",
        ok({JSON: list[ModelState]}) | _MODEL_ERRORS,
    ),
]
