"""A model for a task as the routes see it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count

import msgspec

from api.http import metrics
from api.http.context import current_request
from api.models.base import HeldModel
from api.models.streams import truncated
from runners.contracts.tasks import Finding, TaskRequest, TaskRunner
from runners.contracts.text import ModelInfo

_input_numbers = count(1)


class TaskModel(HeldModel[TaskRunner]):
    """A model for one task: admission, the deadline and metrics of its inputs."""

    @property
    def task(self) -> str:
        """What the model does."""
        return self.runner.task

    @property
    def info(self) -> ModelInfo | None:
        """What the rank loaded; None until it was ready once."""
        return self.runner.info

    async def run(self, inputs: Sequence[TaskRequest]) -> list[list[Finding]]:
        """The findings of each input; if one is refused, all are.

        Raises: Overloaded, DeadlineExceeded and what `TaskRunner.submit` does.
        """
        request = current_request()
        with self.admission.admit(len(inputs)):
            running = [
                asyncio.ensure_future(
                    self._run(f"{request.request_id}-{next(_input_numbers)}", each)
                )
                for each in inputs
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

    async def _run(self, request_id: str, task_input: TaskRequest) -> list[Finding]:
        request = msgspec.structs.replace(task_input, request_id=request_id)
        async with await self.runner.submit(request) as stream:
            async for result in stream:
                return result.findings
        raise truncated()
