"""What is asked of a task before BentoML takes it, whose answer would come much later."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.errors import error_response
from runners.contracts.errors import InvalidRequest


class TaskGateMiddleware:
    """Refuses bad tasks as they are submitted, and to cancel one, which BentoML only notes down."""

    def __init__(self, app: ASGIApp, *, route: str, check: Callable[[bytes], None]) -> None:
        self.app = app
        self.route = route
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, whose body was read."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path == f"{self.route}/cancel":
            error = InvalidRequest("a submitted task can not be cancelled")
            return await error_response(error)(scope, receive, send)
        if path != f"{self.route}/submit" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        pending: list[Message] = [await receive()]
        try:
            self.check(pending[0].get("body", b""))
        except Exception as error:
            return await error_response(error)(scope, receive, send)

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return await self.app(scope, replay, send)
