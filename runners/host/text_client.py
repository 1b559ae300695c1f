"""RankedTextRunner: the async facade over a rank group that serves text, one for all engines."""

from __future__ import annotations

import asyncio
import itertools

from runners.config.model import BaseRunnerConfig
from runners.contracts.errors import TriptychError, from_wire
from runners.contracts.text import GenerationRequest, ModelInfo, Prompt, TextDelta
from runners.host.client import RankedRunner, RankedStream
from runners.protocol.messages import (
    CallFailed,
    Deltas,
    Detokenize,
    RankMessage,
    Submit,
    Text,
    Tokenize,
    Tokens,
)


class RankedTextRunner(RankedRunner[TextDelta]):
    """A text model in a rank group; see `contracts.TextRunner`."""

    def __init__(self, config: BaseRunnerConfig, *, program: str) -> None:
        super().__init__(
            config, program=program, is_last=lambda delta: delta.finish_reason is not None
        )
        self._calls: dict[int, asyncio.Future[list[int] | str]] = {}
        self._call_ids = itertools.count()

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        info = self._group.info
        return info if isinstance(info, ModelInfo) else None

    async def generate(self, request: GenerationRequest) -> RankedStream[TextDelta]:
        """Hand a request to the engine and return once it was accepted."""
        return await self._submit(request.request_id, Submit(request))

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text or a rendered conversation."""
        call_id = next(self._call_ids)
        answer = await self._call(call_id, Tokenize(call_id, prompt, add_special_tokens))
        return answer if isinstance(answer, list) else []

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        call_id = next(self._call_ids)
        answer = await self._call(call_id, Detokenize(call_id, token_ids, skip_special_tokens))
        return answer if isinstance(answer, str) else ""

    async def _call(self, call_id: int, message: Tokenize | Detokenize) -> list[int] | str:
        self._group.send(message)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            answer: list[int] | str = await future
            return answer
        finally:
            self._calls.pop(call_id, None)

    def _on_message(self, message: RankMessage) -> None:
        match message:
            case Deltas(deltas):
                for delta in deltas:
                    self._deliver(delta.request_id, delta)
            case Tokens(call_id, answer) | Text(call_id, answer):
                self._answer(call_id, answer)
            case CallFailed(call_id, kind, text, param):
                self._answer(call_id, from_wire(kind, text, param))
            case _:
                super()._on_message(message)

    def _answer(self, call_id: int, answer: list[int] | str | TriptychError) -> None:
        future = self._calls.get(call_id)
        if future is None or future.done():
            return
        if isinstance(answer, TriptychError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_down(self, reason: str) -> None:
        super()._on_down(reason)
        for call_id in list(self._calls):
            self._answer(call_id, self._lost(reason))
