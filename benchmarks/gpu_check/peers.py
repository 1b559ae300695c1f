"""What Triptych is compared with, each in a new process.

Triptych replaces operators of torch, and functions of transformers, for its whole process. A peer
that ran after it in the same process would run on them, and find less memory.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from benchmarks.gpu_check.device import Device

P = ParamSpec("P")
T = TypeVar("T")


class _Failure(NamedTuple):
    """Why there are no more results."""

    reason: str


def in_new_process(
    function: Callable[Concatenate[Device, P], Iterator[T]],
) -> Callable[Concatenate[Device, P], Iterator[T]]:
    """A generator function of a module, whose every call runs in a new process.

    Its results come one by one, and its process is gone after the last one. A dry run calls it in
    this process. Raises: RuntimeError if the process fails, or as `Device.require_stock`.
    """

    @wraps(function)
    def run(device: Device, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        if device.dry:
            device.require_stock()
            yield from function(device, *args, **kwargs)
            return
        context = get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        target = (function.__module__, function.__name__)
        process = context.Process(target=_work, args=(sender, target, device, args, kwargs))
        process.start()
        sender.close()
        try:
            with receiver, suppress(EOFError):
                while True:
                    result = receiver.recv()
                    if isinstance(result, _Failure):
                        raise RuntimeError(result.reason)
                    yield result
            process.join()
            if process.exitcode:
                name = function.__name__.strip("_")
                raise RuntimeError(f"the process of {name} ended with status {process.exitcode}")
        finally:
            process.kill()
            process.join()

    return run


def _work(
    sender: Connection,
    target: tuple[str, str],
    device: Device,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """The new process."""
    try:
        device.require_stock()
        module, name = target
        function = getattr(importlib.import_module(module), name).__wrapped__
        for result in function(device, *args, **kwargs):
            sender.send(result)
    except Exception as error:  # of any library
        traceback.print_exc()
        sender.send(_Failure(f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    # A library's thread may keep a normal exit waiting.
    os._exit(0)
