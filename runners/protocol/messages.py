"""The msgpack schema between the HTTP worker ("host") and the ranks.

Tagged structs: a frame that is none of these, or carries a field of the wrong type, is refused by
the decoder. Nothing is pickled.
"""

from __future__ import annotations

import msgspec

from runners.contracts.errors import EngineFailure, TriptychError
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest
from runners.contracts.runner import RunnerState
from runners.contracts.tasks import Finding, TaskRequest
from runners.contracts.text import GenerationRequest, ModelInfo, Prompt, TextDelta


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Host: generate this. Answered by `Accepted` then `Deltas`, or by `Failed`."""

    request: GenerationRequest


class Paint(msgspec.Struct, frozen=True, tag=True):
    """Host: paint this. Answered by `Accepted` then `Painted`, or by `Failed`."""

    request: ImageRequest


class RunTask(msgspec.Struct, frozen=True, tag=True):
    """Host: one input of a task. Answered by `Accepted` then `Found`, or by `Failed`."""

    request: TaskRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Host: nobody waits for this request any more. Never answered."""

    request_id: str


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    """Host: token ids of a prompt, please. Answered by `Tokens` or `CallFailed`."""

    call_id: int
    prompt: Prompt
    add_special_tokens: bool


class Detokenize(msgspec.Struct, frozen=True, tag=True):
    """Host: the text of token ids, please. Answered by `Text` or `CallFailed`."""

    call_id: int
    token_ids: list[int]
    skip_special_tokens: bool


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Host: end now."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Rank: the first message on every connection."""

    rank: int
    pid: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: what the start-up is doing."""

    state: RunnerState
    detail: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: the model serves."""

    info: ModelInfo


class ImageReady(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: the image model serves."""

    info: ImageModelInfo


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """Rank: the start can not succeed, however often it is tried; `kind` names the error class."""

    kind: str
    message: str


class Broken(msgspec.Struct, frozen=True, tag=True):
    """Rank: a step failed, and with it the rank, which ends now."""

    rank: int
    reason: str


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Rank: alive, once a second. `step_age` is the seconds the current step has taken so far."""

    rank: int
    step_age: float
    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: the request is valid and queued."""

    request_id: str
    prompt_tokens: int = 0


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: what one step added, for all sequences at once."""

    deltas: list[TextDelta]


class Painted(msgspec.Struct, frozen=True, tag=True):
    """Rank: what one step did, for all pictures at once."""

    events: list[ImageEvent]


class Found(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: answer to `RunTask`."""

    request_id: str
    findings: list[Finding]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: this request ends with an error; `kind` names a class of `contracts.errors`."""

    request_id: str
    kind: str
    message: str
    param: str | None = None


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: answer to `Tokenize`."""

    call_id: int
    token_ids: list[int]


class Text(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: answer to `Detokenize`."""

    call_id: int
    text: str


class CallFailed(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: a `Tokenize` or `Detokenize` that can not be answered."""

    call_id: int
    kind: str
    message: str
    param: str | None = None


HostMessage = Submit | Paint | RunTask | Abort | Tokenize | Detokenize | Shutdown
RankMessage = (
    Hello
    | Progress
    | Ready
    | ImageReady
    | Fatal
    | Broken
    | Heartbeat
    | Accepted
    | Deltas
    | Painted
    | Found
    | Failed
    | Tokens
    | Text
    | CallFailed
)


def failure(request_id: str, error: Exception) -> Failed:
    """An error as the message that tells the host. What nobody raises on purpose is not quoted."""
    if isinstance(error, TriptychError):
        return Failed(request_id, type(error).__name__, error.message, error.param)
    message = f"the engine failed on this request: {type(error).__name__}"
    return Failed(request_id, EngineFailure.__name__, message)
