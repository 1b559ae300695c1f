"""The model of a pipeline task as the routes see it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from api.http import metrics
from api.http.context import current_request
from api.models.base import ServedModel
from api.models.streams import truncated
from runners.contracts.tasks import Finding, TaskRequest, TaskRunner
from runners.contracts.text import ModelInfo


class TaskModel(ServedModel[TaskRunner]):
    """A model for one task: admission, deadline and metrics of its inputs."""

    @property
    def task(self) -> str:
        """The task, such as `fill-mask`."""
        return self.runner.task

    @property
    def info(self) -> ModelInfo | None:
        """What the rank loaded; None before it was ready once."""
        return self.runner.info

    async def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        """The findings of each input; if one input is refused, the others are aborted.

        Raises: Overloaded, DeadlineExceeded and what `TaskRunner.submit` does.
        """
        context = current_request()
        with self.admission.admit(len(requests)):
            tasks = [asyncio.ensure_future(self._run(request)) for request in requests]
            try:
                async with context.within_deadline():
                    findings = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        metrics.TASK_INPUTS.labels(context.route).inc(len(requests))
        return findings

    async def _run(self, request: TaskRequest) -> list[Finding]:
        async with await self.runner.submit(request) as stream:
            async for result in stream:
                return result.findings
        raise truncated()
