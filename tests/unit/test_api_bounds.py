"""Every number that a client sends is bounded by its type: none reaches a rank or a message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import api.native.images
import api.native.schemas
import api.openai.images
import api.openai.requests
import api.tasks.routes
import api.torchserve.predictions
from api.http.schemas import WireModel

assert api.tasks.routes
assert api.torchserve.predictions


def _models(base: type[WireModel] = WireModel) -> Iterator[type[WireModel]]:
    for model in base.__subclasses__():
        yield model
        yield from _models(model)


def _numbers(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield path, schema
        for key, value in schema.items():
            yield from _numbers(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for i, item in enumerate(schema):
            yield from _numbers(item, f"{path}.{i}")


@pytest.mark.parametrize("model", sorted(set(_models()), key=str))
def test_numbers_have_an_upper_and_a_lower_bound(model: type[WireModel]) -> None:
    schema = model.model_json_schema()
    unbounded = [
        path
        for path, number in _numbers(schema)
        if "const" not in number
        and not (
            {"maximum", "exclusiveMaximum"} & number.keys()
            and {"minimum", "exclusiveMinimum"} & number.keys()
        )
    ]
    assert unbounded == []
