"""Easels: each holds one picture in the making; `Studio` runs their models' calls together.

A picture's code runs in a greenlet: not a thread, so one of them runs at a time, in an order that
never varies, and torch keeps one pool of threads for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import greenlet
import torch

from runners.images.batching import Call, groups_of, run_together


class Easel(greenlet.greenlet):
    """One picture in the making: `work`, which stops at each call of a gated function."""

    call: Call | None = None
    """What it waits for; None before its start and after its end."""


def gated(function: Callable[..., Any], *, but: frozenset[str] = frozenset()) -> Any:
    """`function`, as code at an easel sees it: the call waits until the studio has run it.

    `but`: keyword arguments that the function takes and ignores, and that would keep calls apart.
    """

    @functools.wraps(function)
    def wait(*args: Any, **kwargs: Any) -> Any:
        current = greenlet.getcurrent()
        if not isinstance(current, Easel):
            return function(*args, **kwargs)
        current.call = Call(function, args, {k: v for k, v in kwargs.items() if k not in but})
        return current.parent.switch()  # type: ignore[union-attr]

    return wait


class Studio:
    """The easels of a rank, by request id. All methods belong to one thread."""

    def __init__(self) -> None:
        self._easels: dict[str, Easel] = {}

    def __len__(self) -> int:
        return len(self._easels)

    def begin(self, request_id: str, work: Callable[[], None]) -> None:
        """Start a picture: its code runs up to its first model call.

        What `work` raises comes out here or in `step`, and is the end of all.
        """
        easel = self._easels[request_id] = Easel(work)
        easel.switch()
        self._clear_away(request_id)

    def stop(self, request_id: str) -> None:
        """Give a picture up, wherever its code is; its code sees a `GreenletExit`."""
        easel = self._easels.pop(request_id, None)
        if easel is not None:
            easel.throw()

    def step(self) -> None:
        """Run every call that waits, those together that fit, and each picture up to its next."""
        waiting = [(request_id, easel, easel.call) for request_id, easel in self._easels.items()]
        calls = [call for _, _, call in waiting if call is not None]
        for group in groups_of(calls):
            for index, resume in zip(group, _results([calls[i] for i in group]), strict=True):
                request_id, easel, _ = waiting[index]
                easel.call = None
                resume(easel)
                self._clear_away(request_id)

    def _clear_away(self, request_id: str) -> None:
        if self._easels[request_id].dead:
            del self._easels[request_id]


def _results(calls: list[Call]) -> list[Callable[[Easel], object]]:
    """How each of the calls goes on: with its result, or with its own error."""
    try:
        return [functools.partial(_give, result) for result in run_together(calls)]
    except torch.AcceleratorError:  # after which the device computes nothing any more
        raise
    except Exception as error:
        if len(calls) == 1:
            return [functools.partial(_raise, error)]
        # Memory that does not suffice for all, or one that spoils it for the others.
        return [resume for call in calls for resume in _results([call])]


def _give(result: Any, easel: Easel) -> None:
    easel.switch(result)


def _raise(error: Exception, easel: Easel) -> None:
    easel.throw(error)
