"""RankedTaskRunner: the async facade over a rank that runs one of the pipeline tasks."""

from __future__ import annotations

from runners.config.model import AccelerateConfig, BaseRunnerConfig
from runners.contracts.tasks import Finding, TaskRequest
from runners.contracts.text import ModelInfo
from runners.host.client import RankedRunner
from runners.protocol.messages import Found, RankMessage, RunTask


def on_accelerate(config: BaseRunnerConfig) -> AccelerateConfig:
    """The config of a model that runs on the Accelerate engine, whatever engine it names."""
    if isinstance(config, AccelerateConfig):
        return config
    shared = config.model_dump(
        include=set(BaseRunnerConfig.model_fields), exclude={"tensor_parallel"}
    )
    return AccelerateConfig(**shared)


class RankedTaskRunner(RankedRunner[list[Finding]]):
    """A model for a task in one rank; see `contracts.tasks.TaskRunner`."""

    def __init__(self, config: BaseRunnerConfig, *, program: str) -> None:
        super().__init__(config, program=program, is_last=lambda _: True)

    @property
    def task(self) -> str:
        """What the model does."""
        return self._config.task

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        info = self._group.info
        return info if isinstance(info, ModelInfo) else None

    async def run(self, request: TaskRequest) -> list[Finding]:
        """Wait for the answer to one input."""
        async with await self._submit(request.request_id, RunTask(request)) as stream:
            return await anext(aiter(stream))

    def _on_message(self, message: RankMessage) -> None:
        match message:
            case Found(request_id, findings):
                self._deliver(request_id, findings)
            case _:
                super()._on_message(message)
