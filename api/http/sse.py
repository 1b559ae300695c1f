"""Server-sent events: frames, and what becomes of an error before or after the first of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from api.http.errors import error_body

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies must neither store nor hold back a stream."""
MEDIA_TYPE = "text/event-stream"


def frame(data: str, *, event: str | None = None) -> str:
    """One event. `data` is JSON, which holds no line ends."""
    return f"event: {event}\ndata: {data}\n\n" if event else f"data: {data}\n\n"


async def guarded(frames: AsyncIterator[str], *, error_event: str | None) -> AsyncIterator[str]:
    """`frames`, with an error after the first of them told in a last frame.

    An error before the first frame is raised: the status is still ours to choose.
    """
    started = False
    try:
        async for each in frames:
            yield each
            started = True
    except Exception as error:
        if not started:
            raise
        yield frame(error_body(error), event=error_event)


async def stream_response(frames: AsyncIterator[str]) -> Response:
    """Answer with `frames` once the first is there. Raises: what the first frame's making does."""
    first = await anext(frames)

    async def all_frames() -> AsyncIterator[str]:
        yield first
        async for each in frames:
            yield each

    return StreamingResponse(all_frames(), headers=HEADERS, media_type=MEDIA_TYPE)
