"""Whatever a client sends is bounded: every number by its type, and the parts of a body."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import api.native.images
import api.native.schemas
import api.openai.images
import api.openai.requests
import api.tasks.routes
import api.torchserve.predictions
from api.http import schemas
from api.http.schemas import MAX_NODES, WireModel, read_json
from api.openai.images import ImageGenerationRequest
from runners.contracts.errors import InvalidRequest
from runners.contracts.images import ImageRequest
from tests.support.fake_models import IMAGE_INFO

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


FULL = MAX_NODES - 4
"""Lists that fit next to an object with two fields and one more list."""


@pytest.mark.parametrize(
    ("filler", "count"),
    [("[]", FULL), ("{}", FULL), ('{"a": 1}', FULL // 2), ("[[1]]", FULL // 2)],
)
def test_a_body_has_so_many_parts(filler: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(parts: int) -> str:
        return f'{{"\\"[{{": 1, "b": [{", ".join([filler] * parts)}]}}'

    assert len(read_json(body(count))["b"]) == count
    assert len(read_json(body(count).encode())["b"]) == count
    monkeypatch.setattr(schemas, "from_json", None)  # not even parsed
    with pytest.raises(InvalidRequest, match="more than 50000 lists, objects and fields"):
        read_json(body(count + 1))


@pytest.mark.parametrize("text", ["[", '"', "\\", '\\"[', "\\\\", 'a": {', "é{"])
def test_a_text_has_any_characters(text: str) -> None:
    content = json.dumps({"prompt": text * (MAX_NODES + 1)})
    assert read_json(content) == {"prompt": text * (MAX_NODES + 1)}
    assert read_json(content.encode()) == {"prompt": text * (MAX_NODES + 1)}


@pytest.mark.parametrize("size", ["0x0", "0x64", "64x0", "064x64", "٦٤x٦٤", "64X64", "64x64 "])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    request = ImageGenerationRequest(prompt="a", size=size)
    with pytest.raises(InvalidRequest, match=r"^size: must be width x height"):
        request.requests()


@pytest.mark.parametrize("side", ["height", "width"])
def test_a_side_of_zero_is_not_the_default(side: str) -> None:
    info = msgspec.structs.replace(IMAGE_INFO, height=64, width=64)
    request = ImageRequest(request_id="r", prompt="a")
    assert (info.checked(request).height, info.checked(request).width) == (64, 64)
    with pytest.raises(InvalidRequest, match=side):
        info.checked(msgspec.structs.replace(request, **{side: 0}))
