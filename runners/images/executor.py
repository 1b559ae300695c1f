"""Runs pipelines as coroutines and batches their model calls.

Each image's pipeline runs in a greenlet: no thread, so exactly one runs at a time, in a fixed
order, and all share torch's one thread pool. Called by the image program, in rank processes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import torch

from runners.images.batching import ModelCall, group_compatible, run_batched

logger = logging.getLogger("triptych.images")


class PipelineCoroutine(greenlet.greenlet):
    """The pipeline run of one image, suspended at every call of a `batched` function."""

    call: ModelCall | None = None
    """The pending call; None before the start and after the end."""


def batched(function: Callable[..., Any], *, ignored_kwargs: frozenset[str] = frozenset()) -> Any:
    """Wrap `function` so that a call from a `PipelineCoroutine` waits for its batch.

    Other callers run `function` directly. `ignored_kwargs`: keyword arguments without effect, which
    are dropped because different values would keep calls out of one batch.
    """

    @functools.wraps(function)
    def suspend(*args: Any, **kwargs: Any) -> Any:
        current = greenlet.getcurrent()
        if not isinstance(current, PipelineCoroutine):
            return function(*args, **kwargs)
        effective = {k: v for k, v in kwargs.items() if k not in ignored_kwargs}
        current.call = ModelCall(function, args, effective)
        return current.parent.switch()  # type: ignore[union-attr]

    return suspend


class BatchExecutor:
    """The running pipelines of a rank, by request id. All methods belong to one thread.

    `start` and `step` raise what a pipeline's code raises; no further step is possible then.
    """

    def __init__(self) -> None:
        self._running: dict[str, PipelineCoroutine] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[str]:
        return iter(self._running)

    def start(self, request_id: str, run: Callable[[], None]) -> None:
        """Start an image: `run` is executed up to its first model call."""
        coroutine = self._running[request_id] = PipelineCoroutine(run)
        coroutine.switch()
        self._remove_if_finished(request_id)

    def abort(self, request_id: str) -> None:
        """Abort an image if it is running: a `GreenletExit` is raised in its code."""
        coroutine = self._running.pop(request_id, None)
        if coroutine is not None:
            coroutine.throw()

    def step(self) -> None:
        """Run all pending calls, in as few batches as possible, and each image up to its next."""
        pending = [
            (request_id, coroutine, coroutine.call)
            for request_id, coroutine in self._running.items()
            if coroutine.call is not None
        ]
        for group in group_compatible([call for _, _, call in pending]):
            outcomes = _run_group([pending[index][2] for index in group])
            for index, outcome in zip(group, outcomes, strict=True):
                request_id, coroutine, _ = pending[index]
                coroutine.call = None
                outcome.resume(coroutine)
                self._remove_if_finished(request_id)

    def _remove_if_finished(self, request_id: str) -> None:
        if self._running[request_id].dead:
            del self._running[request_id]


@dataclass(frozen=True)
class _Outcome:
    """The result of a model call, or the error that it raised."""

    result: Any = None
    error: Exception | None = None

    def resume(self, coroutine: PipelineCoroutine) -> None:
        if self.error is None:
            coroutine.switch(self.result)
        else:
            coroutine.throw(self.error)


def _run_group(calls: list[ModelCall]) -> list[_Outcome]:
    try:
        return [_Outcome(result) for result in run_batched(calls)]
    except torch.AcceleratorError:  # the device computes nothing afterwards
        raise
    except Exception as error:
        # The frames of its traceback would keep the memory of the forward.
        failure = error.with_traceback(None)
    if isinstance(failure, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    if len(calls) == 1:
        return [_Outcome(error=failure)]
    # The batch may not fit into memory, or one call may be at fault.
    logger.warning(
        "a batch of %d model calls failed with %s; each runs alone",
        len(calls),
        type(failure).__name__,
    )
    return [outcome for call in calls for outcome in _run_group([call])]
