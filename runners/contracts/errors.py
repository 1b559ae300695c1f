"""Every error Triptych raises on purpose, as one small tree.

TriptychError
├── ConfigError             a setting, model folder or engine that cannot work; stops the start
│   ├── ModelNotFound       no such store tag, folder or hub id
│   ├── IncompleteModel     a model folder lacks a file it needs
│   ├── UnsafeModel         the model carries code or pickles we refuse to load
│   └── EngineUnavailable   the engine is not part of this build
├── RequestError            the client's mistake: nothing was computed
│   ├── InvalidRequest      a field is wrong, unknown or out of range
│   ├── ContextLengthExceeded   prompt (plus asked-for tokens) does not fit the model
│   ├── Unauthorized        the API key is missing or wrong
│   ├── ModelNotServed      the request names a model this server does not serve
│   │   └── ModelVersionNotServed   or a version of it
│   ├── PayloadTooLarge     the body is larger than the server accepts
│   ├── UnsupportedMediaType    the body is encoded in a way that the server does not accept
│   └── SlowRequest         the request did not arrive in time
├── Overloaded              the queue is full; try again after `retry_after_s`
├── DeadlineExceeded        the request ran past its time limit
├── RunnerUnavailable       the rank group is not ready, or died with the request in flight
├── ContentFiltered         the image model's own safety checker rejected the image
└── EngineFailure           the engine failed on this request alone

`api/http/errors.py` maps each to a status code. Errors of a rank cross the channel as class
name, reason and field (`from_wire`), never pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from typing_extensions import override


class TriptychError(Exception):
    """Base of all errors below: a reason, and the field at fault where there is one.

    The sentence for the user, `message`, is made of both where the error leaves the process.
    """

    def __init__(self, reason: str, *, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field

    @property
    def message(self) -> str:
        """One sentence fit for the user."""
        return self.reason if self.field is None else f"{self.field}: {self.reason}"

    def __str__(self) -> str:
        return self.message


class ConfigError(TriptychError):
    """A setting, a model folder or an engine choice that cannot work; `source` names the file."""

    def __init__(self, reason: str, *, field: str | None = None, source: str | None = None) -> None:
        super().__init__(reason, field=field)
        self.source = source

    @property
    @override
    def message(self) -> str:
        return super().message if self.source is None else f"{self.source}: {super().message}"


class ModelNotFound(ConfigError):
    """No such store tag, folder or hub id."""


class IncompleteModel(ConfigError):
    """A model folder lacks a file it needs."""

    @classmethod
    def missing_weights(cls, name: str, model_class: type, weights: Iterable[str]) -> Self:
        """Model `name` lacks weights that its class needs; transformers would initialise them."""
        missing = sorted(weights)
        return cls(
            f"{name} lacks {len(missing)} of the weights that {model_class.__name__} needs, such "
            f"as {', '.join(missing[:3])}"
        )


class UnsafeModel(ConfigError):
    """The model carries code or pickled weights that Triptych refuses to load."""


class EngineUnavailable(ConfigError):
    """The chosen engine is not part of this build."""


class RequestError(TriptychError):
    """The client's mistake; nothing was computed."""


class InvalidRequest(RequestError):
    """A field is wrong, unknown or out of range."""


class ContextLengthExceeded(RequestError):
    """The prompt, or the prompt plus the tokens asked for, does not fit the model."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""


class ModelNotServed(RequestError):
    """The request names a model this server does not serve."""


class ModelVersionNotServed(ModelNotServed):
    """The request names a version of a model that this server does not serve."""


class PayloadTooLarge(RequestError):
    """The body is larger than the server accepts."""


class UnsupportedMediaType(RequestError):
    """The body is encoded in a way that the server does not accept."""


class SlowRequest(RequestError):
    """The request did not arrive in time."""


class Overloaded(TriptychError):
    """The queue is full.

    `retry_after_s`: a whole number of seconds to wait.
    """

    def __init__(self, reason: str, *, field: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(reason, field=field)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TriptychError):
    """The request ran past its time limit."""


class RunnerUnavailable(TriptychError):
    """The rank group is not ready, or died while the request was in flight."""


class ContentFiltered(TriptychError):
    """The image model's own safety checker rejected the generated image."""


class EngineFailure(TriptychError):
    """The engine failed on this request; others are untouched."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error's class where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def reraise_as(
    error_class: type[TriptychError], what: str, *, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn whatever a library raises about a damaged or unknown file into one sentence.

    The sentence is `what`, then the class and the first line of the library's error. No list of
    exception classes is complete: on the same few bytes one reader overflows its stack and another
    asserts. Our own errors, MemoryError and those in `passing` are not touched.
    """
    try:
        yield
    except (TriptychError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, passing):
            raise
        reason = " ".join(first_line(error).split())[:300]
        detail = reason if reason == type(error).__name__ else f"{type(error).__name__}: {reason}"
        raise error_class(f"{what}: {detail}") from error


def _subclasses(cls: type[TriptychError]) -> dict[str, type[TriptychError]]:
    classes = {cls.__name__: cls}
    for subclass in cls.__subclasses__():
        classes |= _subclasses(subclass)
    return classes


def from_wire(name: str, reason: str, field: str | None = None) -> TriptychError:
    """Rebuild an error that a rank sent by class name; an unknown name gives `EngineFailure`."""
    return _subclasses(TriptychError).get(name, EngineFailure)(reason, field=field)
