"""The msgpack schema between the HTTP worker (the host) and the ranks.

Tagged structs: the decoder refuses a frame that is none of these or has a field of the wrong type.
Nothing is pickled.
"""

from __future__ import annotations

import msgspec

from runners.contracts.errors import EngineFailure, TriptychError
from runners.contracts.images import ImageEvent, ImageModelInfo, ImageRequest
from runners.contracts.runner import RunnerState
from runners.contracts.tasks import TaskRequest, TaskResult
from runners.contracts.text import GenerationRequest, ModelInfo, Prompt, TextDelta


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Host: run this request. Answered by `Accepted`, then `Events`; or by `Failed`."""

    request: GenerationRequest | ImageRequest | TaskRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Host: drop this request. Never answered."""

    request_id: str


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    """Host: the token ids of a prompt. Answered by `Tokens` or `CallFailed`."""

    call_id: int
    prompt: Prompt
    add_special_tokens: bool


class Detokenize(msgspec.Struct, frozen=True, tag=True):
    """Host: the text of token ids. Answered by `Text` or `CallFailed`."""

    call_id: int
    token_ids: list[int]
    skip_special_tokens: bool


class AbortCall(msgspec.Struct, frozen=True, tag=True):
    """Host: drop this call. Never answered."""

    call_id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Host: end now."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Rank: the first message on every connection."""

    rank: int
    pid: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: the current phase of the start."""

    state: RunnerState
    detail: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: the model is served."""

    info: ModelInfo | ImageModelInfo


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """Rank: the start cannot succeed, however often it is tried."""

    error: str
    """Class name of the error."""
    message: str


class Broken(msgspec.Struct, frozen=True, tag=True):
    """Rank: a step failed, and the rank ends now."""

    rank: int
    reason: str
    lost_another: bool = False
    """Whether the cause is the loss of another rank."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Rank: alive, once a second. `step_age` is the duration of the current step in seconds."""

    rank: int
    step_age: float
    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Rank: the request is valid and queued."""

    request_id: str
    prompt_tokens: int = 0
    max_new_tokens: int = 0
    """The tokens it generates at most; 0 where the task generates none."""


class Events(msgspec.Struct, frozen=True, tag=True):
    """Rank: what one step added, for all requests in the batch."""

    events: list[TextDelta | ImageEvent | TaskResult]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Rank: this request ends with an error, see `contracts.errors.from_wire`."""

    request_id: str
    error: str
    """Class name of the error."""
    reason: str
    field: str | None = None


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: answer to `Tokenize`."""

    call_id: int
    token_ids: list[int]


class Text(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: answer to `Detokenize`."""

    call_id: int
    text: str


class CallFailed(msgspec.Struct, frozen=True, tag=True):
    """Rank 0: a `Tokenize` or `Detokenize` failed, see `contracts.errors.from_wire`."""

    call_id: int
    error: str
    """Class name of the error."""
    reason: str
    field: str | None = None


HostMessage = Submit | Abort | Tokenize | Detokenize | AbortCall | Shutdown
RankMessage = (
    Hello
    | Progress
    | Ready
    | Fatal
    | Broken
    | Heartbeat
    | Accepted
    | Events
    | Failed
    | Tokens
    | Text
    | CallFailed
)


def request_failed(request_id: str, error: Exception) -> Failed:
    """An error as the message that ends its request."""
    return Failed(request_id, *_to_wire(error))


def call_failed(call_id: int, error: BaseException) -> CallFailed:
    """An error as the message that ends a call."""
    return CallFailed(call_id, *_to_wire(error))


def _to_wire(error: BaseException) -> tuple[str, str, str | None]:
    """Class name, reason and field; the text of an unexpected error is not sent."""
    if isinstance(error, TriptychError):
        return type(error).__name__, error.reason, error.field
    reason = f"the engine failed on this request: {type(error).__name__}"
    return EngineFailure.__name__, reason, None
