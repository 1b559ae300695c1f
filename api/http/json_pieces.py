"""JSON of any length, encoded and sent in pieces, between which other requests are served.

An answer of a hundred megabytes takes a second to encode: in one piece, all other requests would
wait for it. In a thread it would hold the interpreter's lock just as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, GetPydanticSchema, WithJsonSchema
from starlette.responses import Response, StreamingResponse

PIECE_BYTES = 64 * 1024
"""A piece is sent once it has this length."""
BATCH = 128
"""Items of a list that are encoded at once."""
_BASE64_BYTES = PIECE_BYTES // 4 * 3
_MEDIA_TYPE = "application/json"

Base64 = Annotated[bytes, WithJsonSchema({"type": "string", "contentEncoding": "base64"})]
"""Bytes that are in base64 on the wire."""


def json_of(item: Any) -> Any:
    """Describes a `msgspec.Raw` in the schema of a response: it has the JSON of an `item`."""
    return GetPydanticSchema(lambda _, handler: handler(item))


def encode(value: object, *, omit_null: bool = False) -> bytes:
    """The JSON of models, dictionaries, lists, `msgspec.Raw` and simple values; bytes in base64.

    `omit_null`: whether fields of models that are None are left out.
    """
    return (_omitting_encoder if omit_null else _encoder).encode(value)


def json_response(value: object, *, omit_null: bool = False) -> Response:
    """A response with the JSON of `value`, as `encode`; a long one is encoded while it is sent."""
    pieces = _merged(_pieces(value, omit_null))
    first = next(pieces)
    if len(first) < PIECE_BYTES:
        return Response(first, media_type=_MEDIA_TYPE)

    async def body() -> AsyncIterator[bytes]:
        yield first
        for piece in pieces:
            # To send is not to wait, as long as the socket takes everything.
            await asyncio.sleep(0)
            yield piece

    return StreamingResponse(body(), media_type=_MEDIA_TYPE)


def _fields(model: object) -> dict[str, Any]:
    if isinstance(model, BaseModel):
        return vars(model)
    raise TypeError(f"{type(model).__name__} cannot be encoded")


def _set_fields(model: object) -> dict[str, Any]:
    return {name: value for name, value in _fields(model).items() if value is not None}


_encoder = msgspec.json.Encoder(enc_hook=_fields)
_omitting_encoder = msgspec.json.Encoder(enc_hook=_set_fields)


def _merged(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of at least PIECE_BYTES, except for the last."""
    merged = bytearray()
    for piece in pieces:
        merged += piece
        if len(merged) >= PIECE_BYTES:
            yield bytes(merged)
            merged.clear()
    if merged:
        yield bytes(merged)


def _pieces(value: object, omit_null: bool) -> Iterator[bytes]:
    match value:
        case BaseModel():
            fields = _set_fields(value) if omit_null else _fields(value)
            mark = b"{"
            for name, field in fields.items():
                yield mark + encode(name) + b":"
                yield from _pieces(field, omit_null)
                mark = b","
            yield b"}" if fields else b"{}"
        case [_, *_]:
            yield from _list_pieces(value, omit_null)
        case bytes():
            yield b'"'
            for start in range(0, len(value), _BASE64_BYTES):
                yield encode(value[start : start + _BASE64_BYTES])[1:-1]
            yield b'"'
        case _:
            yield encode(value, omit_null=omit_null)


def _list_pieces(items: Sequence[object], omit_null: bool) -> Iterator[bytes]:
    mark = b"["
    if isinstance(items[0], BaseModel | list | bytes):
        for item in items:
            yield mark
            yield from _pieces(item, omit_null)
            mark = b","
    else:
        for start in range(0, len(items), BATCH):
            yield mark + encode(items[start : start + BATCH], omit_null=omit_null)[1:-1]
            mark = b","
    yield b"]"
