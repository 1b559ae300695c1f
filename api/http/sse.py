"""Responses of server-sent events, made of frames."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.responses import Response

from api.http.errors import error_body
from api.http.json_pieces import encode

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies must neither store nor buffer a stream."""
MEDIA_TYPE = EventSourceResponse.media_type


def frame(value: object, *, event: str | None = None, omit_null: bool = False) -> bytes:
    """A frame with the JSON of `value`, as `json_pieces.encode`."""
    data = encode(value, omit_null=omit_null).decode()
    return format_sse_event(data_str=data, event=event)


async def stream_response(frames: AsyncIterator[bytes], *, error_event: str | None) -> Response:
    """A response of `frames`, once the first of them is there.

    An error before the first frame is raised, because the status can still be chosen; a later one
    becomes the last frame, an event of the name `error_event`.
    """
    first = await anext(frames)

    async def body() -> AsyncIterator[bytes]:
        yield first
        try:
            async for frame in frames:
                yield frame
        except Exception as error:
            yield format_sse_event(data_str=error_body(error), event=error_event)

    return EventSourceResponse(body(), headers=HEADERS)
