"""TaskProgram: the program of a rank with a model for a pipeline task."""

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
    """A loaded model that does one thing."""

    def check(self, request: TaskRequest) -> None:
        """Raises: InvalidRequest or ContextLengthExceeded for what it can not take."""
        ...

    def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        """The findings of checked requests, which have the same options, in their order."""
        ...


class TaskProgram(RankProgram):
    """Runs one of the pipeline tasks: one forward for all inputs that wait."""

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
        self._present: set[str] = set()
        self._running = 0

    @property
    @override
    def info(self) -> ModelInfo:
        return self._info

    @override
    def receive(self, message: HostMessage) -> None:
        match message:
            case Submit(TaskRequest() as request):
                self._present.add(request.request_id)
                self._inbox.put(request)
            case Abort(request_id) if request_id in self._present:
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
            alike = [r for r in requests if r.options == requests[0].options]
            requests = [r for r in requests if r.options != requests[0].options]
            self._run(alike)
        for request in batch:
            self._present.discard(request.request_id)
            self._aborted.discard(request.request_id)
        self._running = 0

    def _accept(self, request: TaskRequest) -> bool:
        try:
            self._task.check(request)
        except Exception as error:  # whatever a tokenizer raises concerns this input only
            self._emit(request_failed(request.request_id, error))
            return False
        self._emit(Accepted(request.request_id))
        return True

    def _run(self, requests: list[TaskRequest]) -> None:
        try:
            with torch.inference_mode():
                results = self._task.run(requests)
        except Exception as error:
            if len(requests) > 1:  # one of them, or all of them together, is too much
                for request in requests:
                    self._run([request])
                return
            if not isinstance(error, TriptychError):
                logger.error(
                    "an input failed with %s",
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
