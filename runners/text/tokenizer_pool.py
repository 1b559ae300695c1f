"""The tokenizer processes of a rank, and the threads that give them work, in order.

Called by the programs of text models.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from runners.protocol.messages import Failed, request_failed
from runners.text.tokenization import PromptTokenizer
from runners.text.tokenizer_process import (
    PROCESS_NAME,
    Answer,
    Call,
    CallLimits,
    TokenizerProcess,
)

PROCESSES = 2

T = TypeVar("T")


@dataclass(frozen=True)
class _Job(Generic[T]):
    work: Callable[[TokenizerProcess], T]
    deliver: Callable[[T], None]


class TokenizerPool:
    """Gives jobs, in the order in which they come, to `PROCESSES` processes. Thread-safe.

    A job is what a request or a call of the host needs a tokenizer for. Raises: ConfigError for a
    tokenizer that cannot be pickled.
    """

    def __init__(self, tokenizer: PromptTokenizer, limits: CallLimits | None = None) -> None:
        self._jobs: dict[str | int, _Job[Any]] = {}
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[TokenizerProcess] = queue.LifoQueue()
        process = TokenizerProcess(tokenizer, limits)
        for _ in range(PROCESSES):
            self._idle.put(copy.copy(process))
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix=PROCESS_NAME)
        self._threads.submit(self._warm_up)

    def __len__(self) -> int:
        """Number of jobs that wait or run."""
        return len(self._jobs)

    def submit(
        self,
        key: str | int,
        work: Callable[[TokenizerProcess], T],
        deliver: Callable[[T], None],
    ) -> None:
        """Have a thread call `work`, which must not raise, and then `deliver` with its result.

        Neither is called once the job is aborted. An abort waits while `deliver` runs. `key` names
        the job: a request's id, or a call's.
        """
        with self._lock:
            self._jobs[key] = _Job(work, deliver)
        self._threads.submit(self._run, key)

    def prepare(
        self,
        request_id: str,
        work: Callable[[TokenizerProcess], T],
        accept: Callable[[T], None],
        refuse: Callable[[Failed], None],
    ) -> None:
        """Submit what a request needs; its error must not end the rank, and goes to `refuse`."""

        def attempt(process: TokenizerProcess) -> T | Failed:
            try:
                return work(process)
            except Exception as error:
                return request_failed(request_id, error)

        def deliver(result: T | Failed) -> None:
            if isinstance(result, Failed):
                refuse(result)
            else:
                accept(result)

        self.submit(request_id, attempt, deliver)

    def answer(self, call: Call, deliver: Callable[[Answer], None]) -> None:
        """Submit a call of the host."""
        self.submit(call.call_id, lambda process: process.answer(call), deliver)

    def abort(self, key: str | int) -> None:
        """Forget a job, unless it is done."""
        with self._lock:
            self._jobs.pop(key, None)

    def _run(self, key: str | int) -> None:
        job = self._jobs.get(key)
        if job is None:
            return
        with self._borrow() as process:
            process.is_wanted = lambda: self._jobs.get(key) is job
            result = job.work(process)
        with self._lock:
            if self._jobs.get(key) is job:
                del self._jobs[key]
                job.deliver(result)

    @contextlib.contextmanager
    def _borrow(self) -> Iterator[TokenizerProcess]:
        process = self._idle.get()
        try:
            yield process
        finally:
            self._idle.put(process)

    def _warm_up(self) -> None:
        """Start a process before the first request needs it."""
        with self._borrow() as process, contextlib.suppress(OSError, EOFError):
            process.start()
