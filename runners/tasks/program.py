"""TaskProgram: what a rank runs for a task: one forward for all inputs that wait."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from runners.contracts.errors import TriptychError
from runners.contracts.tasks import Finding, TaskRequest
from runners.contracts.text import ModelInfo
from runners.protocol.messages import (
    Abort,
    Accepted,
    Found,
    HostMessage,
    RankMessage,
    RunTask,
    failure,
)
from runners.rank.program import Occupancy

logger = logging.getLogger("triptych.tasks")

IDLE_S = 0.5


class Task(Protocol):
    """A loaded model that does one thing."""

    def check(self, request: TaskRequest) -> None:
        """Raises: InvalidRequest or ContextLengthExceeded for what it can not take."""
        ...

    def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        """The findings of checked requests, which have the same options, in their order."""
        ...


class TaskProgram:
    """See `ranks.worker.RankProgram`."""

    def __init__(
        self,
        info: ModelInfo,
        task: Task,
        *,
        batch_size: int,
        emit: Callable[[RankMessage], None],
    ) -> None:
        self.info = info
        self._task = task
        self._batch_size = batch_size
        self._emit = emit
        self._inbox: queue.SimpleQueue[TaskRequest] = queue.SimpleQueue()
        self._aborted: set[str] = set()
        self._present: set[str] = set()
        self._running = 0

    def receive(self, message: HostMessage) -> None:
        """Queue an input, or remember that nobody waits for it any more."""
        match message:
            case RunTask(request):
                self._present.add(request.request_id)
                self._inbox.put(request)
            case Abort(request_id) if request_id in self._present:
                self._aborted.add(request_id)

    def occupancy(self) -> Occupancy:
        """How full it is."""
        return Occupancy(running=self._running, waiting=self._inbox.qsize())

    def step(self) -> None:
        """Run what waits, at most a batch of it."""
        taken = list(self._taken())
        self._running = len(taken)
        wanted = [r for r in taken if r.request_id not in self._aborted and self._fits(r)]
        while wanted:
            alike = [r for r in wanted if r.options == wanted[0].options]
            wanted = [r for r in wanted if r.options != wanted[0].options]
            self._run(alike)
        for request in taken:
            self._present.discard(request.request_id)
            self._aborted.discard(request.request_id)
        self._running = 0

    def _taken(self) -> Iterator[TaskRequest]:
        try:
            yield self._inbox.get(timeout=IDLE_S)
            for _ in range(self._batch_size - 1):
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _fits(self, request: TaskRequest) -> bool:
        try:
            self._task.check(request)
        except Exception as error:  # whatever a tokenizer raises is this input's alone
            self._emit(failure(request.request_id, error))
            return False
        self._emit(Accepted(request.request_id))
        return True

    def _run(self, requests: list[TaskRequest]) -> None:
        try:
            with torch.inference_mode():
                found = self._task.run(requests)
        except Exception as error:
            if len(requests) > 1:  # one of them, or all of them together, is too much
                for request in requests:
                    self._run([request])
                return
            if not isinstance(error, TriptychError):
                logger.error("an input failed with %s", type(error).__name__)
            self._emit(failure(requests[0].request_id, error))
            return
        for request, findings in zip(requests, found, strict=True):
            self._emit(Found(request.request_id, findings))
