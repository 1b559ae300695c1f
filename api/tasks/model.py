"""A model for a task as the routes see it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from api import metrics
from api.admission import Admission
from api.context import current_request
from runners.contracts import ModelInfo
from runners.contracts.tasks import Finding, TaskRequest, TaskRunner
from runners.errors import ModelNotServed

_input_numbers = count(1)


class TaskModel:
    """A model for one task: admission, the deadline and metrics of its inputs."""

    def __init__(self, runner: TaskRunner, admission: Admission) -> None:
        self._runner = runner
        self._admission = admission

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self._runner.name

    @property
    def task(self) -> str:
        """What the model does."""
        return self._runner.task

    @property
    def info(self) -> ModelInfo | None:
        """What the rank loaded; None until it was ready once."""
        return self._runner.info

    def require(self, name: str | None) -> None:
        """Check that this is the model a request names. Raises: ModelNotServed."""
        if name is not None and name != self.name:
            raise ModelNotServed(
                f"this server does not hold that model; it holds {self.name}", param="model"
            )

    async def run(self, inputs: Sequence[TaskRequest]) -> list[list[Finding]]:
        """The findings of each input; if one is refused, all are.

        Raises: Overloaded, DeadlineExceeded and what `TaskRunner.run` does.
        """
        request = current_request()
        with self._admission.admit(len(inputs)):
            running = [
                asyncio.ensure_future(self._runner.run(replace(each, request_id=request_id)))
                for each in inputs
                for request_id in [f"{request.request_id}-{next(_input_numbers)}"]
            ]
            try:
                async with request.within_deadline():
                    found = await asyncio.gather(*running)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
        metrics.TASK_INPUTS.labels(request.route).inc(len(inputs))
        return found
