"""TaskProgram: the program of a rank with a model for a task of one forward.

It takes requests from the host, batches them and emits results. Made by `runners.engines.tasks` and
called by the rank's loop (`runners.rank.worker`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from typing_extensions import override

from runners.contracts.errors import TriptychError
from runners.contracts.tasks import Finding, TaskRequest, TaskResult
from runners.contracts.text import ModelInfo
from runners.protocol.messages import (
    Abort,
    Accepted,
    Events,
    HostMessage,
    RankMessage,
    Submit,
    request_failed,
)
from runners.rank.inbox import Inbox
from runners.rank.program import Occupancy, RankProgram

logger = logging.getLogger("triptych.tasks")


class Task(Protocol):
    """A loaded model for one task."""

    def check(self, request: TaskRequest) -> None:
        """Check a request before it is accepted. Raises: InvalidRequest, ContextLengthExceeded."""
        ...

    def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        """The findings for each request, in order. All were checked and have the same options."""
        ...


class TaskProgram(RankProgram):
    """Runs the waiting requests of a task together, up to `batch_size` at a time."""

    def __init__(
        self,
        info: ModelInfo,
        task: Task,
        *,
        batch_size: int,
        emit: Callable[[RankMessage], None],
    ) -> None:
        self._info = info
        self._task = task
        self._batch_size = batch_size
        self._emit = emit
        self._inbox = Inbox[TaskRequest]()
        self._aborted: set[str] = set()
        self._active: set[str] = set()
        self._running = 0

    @property
    @override
    def info(self) -> ModelInfo:
        return self._info

    @override
    def receive(self, message: HostMessage) -> None:
        match message:
            case Submit(TaskRequest() as request):
                self._active.add(request.request_id)
                self._inbox.put(request)
            case Abort(request_id) if request_id in self._active:
                self._aborted.add(request_id)

    @override
    def occupancy(self) -> Occupancy:
        return Occupancy(running=self._running, waiting=len(self._inbox))

    @override
    def step(self) -> None:
        batch = self._inbox.take(wait=True, limit=self._batch_size)
        self._running = len(batch)
        requests = [r for r in batch if r.request_id not in self._aborted and self._accept(r)]
        while requests:
            options = requests[0].options
            self._run([r for r in requests if r.options == options])
            requests = [r for r in requests if r.options != options]
        for request in batch:
            self._active.discard(request.request_id)
            self._aborted.discard(request.request_id)
        self._running = 0

    def _accept(self, request: TaskRequest) -> bool:
        try:
            self._task.check(request)
        except Exception as error:  # a tokenizer's error must not end the rank
            self._emit(request_failed(request.request_id, error))
            return False
        self._emit(Accepted(request.request_id))
        return True

    def _run(self, requests: list[TaskRequest]) -> None:
        try:
            with torch.inference_mode():
                results = self._task.run(requests)
        except Exception as error:
            if len(requests) > 1:  # one may be at fault, or the batch too large
                for request in requests:
                    self._run([request])
                return
            if not isinstance(error, TriptychError):
                logger.error(
                    "a request failed with %s",
                    type(error).__name__,
                    extra={"request_id": requests[0].request_id},
                )
            self._emit(request_failed(requests[0].request_id, error))
            return
        self._emit(
            Events(
                [
                    TaskResult(request_id=request.request_id, findings=findings)
                    for request, findings in zip(requests, results, strict=True)
                ]
            )
        )
