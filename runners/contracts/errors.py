"""Every error Triptych raises on purpose, as one small tree.

TriptychError
├── ConfigError             a setting, model folder or engine that can not work; stops the start
│   ├── ModelNotFound       no such store tag, folder or hub id
│   ├── IncompleteModel     a model folder lacks a file it needs
│   ├── UnsafeModel         the model carries code or pickles we refuse to load
│   └── EngineUnavailable   the engine is not part of this build
├── RequestError            the client's mistake: nothing was computed
│   ├── InvalidRequest      a field is wrong, unknown or out of range
│   ├── ContextLengthExceeded   prompt (plus asked-for tokens) does not fit the model
│   ├── Unauthorized        the API key is missing or wrong
│   ├── ModelNotServed      the request names a model this server does not hold
│   │   └── ModelVersionNotServed   or a version of it
│   └── PayloadTooLarge     the body is larger than the server accepts
├── Overloaded              the queue is full; try again after `retry_after_s`
├── DeadlineExceeded        the request ran past its time limit
├── RunnerUnavailable       the rank group is not ready, or died with the request in flight
├── PictureWithheld         the image model's own safety checker objects to what it painted
└── EngineFailure           the engine failed on this request alone

`api/http/errors.py` maps each to a status code. Errors of a rank cross the channel by class name
(`to_wire`, `from_wire`), never pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class TriptychError(Exception):
    """Base of all errors below. `str(error)` is one sentence fit for the user."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(TriptychError):
    """A setting, a model folder or an engine choice that can not work."""


class ModelNotFound(ConfigError):
    """No such store tag, folder or hub id."""


class IncompleteModel(ConfigError):
    """A model folder lacks a file it needs."""

    @classmethod
    def lacking(cls, name: str, kind: type, weights: Iterable[str]) -> IncompleteModel:
        """Model `name` lacks weights that its class needs; transformers would make them up."""
        missing = sorted(weights)
        return cls(
            f"{name} lacks {len(missing)} of the weights that {kind.__name__} needs, such as "
            f"{', '.join(missing[:3])}"
        )


class UnsafeModel(ConfigError):
    """The model carries code or pickled weights that Triptych refuses to load."""


class EngineUnavailable(ConfigError):
    """The chosen engine is not part of this build."""


class RequestError(TriptychError):
    """The client's mistake; `param` names the field at fault where there is one."""


class InvalidRequest(RequestError):
    """A field is wrong, unknown or out of range."""


class ContextLengthExceeded(RequestError):
    """The prompt, or the prompt plus the tokens asked for, does not fit the model."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""


class ModelNotServed(RequestError):
    """The request names a model this server does not hold."""


class ModelVersionNotServed(ModelNotServed):
    """The request names a version of a model that this server does not hold."""


class PayloadTooLarge(RequestError):
    """The body is larger than the server accepts."""


class Overloaded(TriptychError):
    """The queue is full; `retry_after_s` is a whole number of seconds to wait."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TriptychError):
    """The request ran past its time limit."""


class RunnerUnavailable(TriptychError):
    """The rank group is not ready, or died while the request was in flight."""


class PictureWithheld(TriptychError):
    """The image model's own safety checker objects to the picture it painted."""


class EngineFailure(TriptychError):
    """The engine failed on this request; others are untouched."""


@contextmanager
def told_as(kind: type[TriptychError], what: str) -> Iterator[None]:
    """Whatever a library makes of a damaged file, as one sentence: `what`, and the reason.

    No list of what it may raise is ever complete: of the same few bytes one reader runs out of
    stack, another asserts. Our own errors pass, and so does MemoryError.
    """
    try:
        yield
    except (TriptychError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{what}: {reason[:300]}") from None


def _tree(cls: type[TriptychError]) -> dict[str, type[TriptychError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


def from_wire(kind: str, message: str, param: str | None = None) -> TriptychError:
    """Rebuild an error sent by a rank as its class name; unknown names become `EngineFailure`."""
    return _tree(TriptychError).get(kind, EngineFailure)(message, param=param)
