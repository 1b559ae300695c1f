"""RankedTaskRunner: the async facade over a rank that runs one of the pipeline tasks."""

from __future__ import annotations

import asyncio
import logging

from runners.config import AccelerateConfig, BaseRunnerConfig
from runners.contracts import Finding, ModelInfo, RunnerHealth, TaskRequest
from runners.errors import RunnerUnavailable, TriptychError, from_wire
from runners.ranks.group import RankGroup
from runners.ranks.messages import Abort, Failed, Found, RankMessage, RunTask

logger = logging.getLogger("triptych")


def on_accelerate(config: BaseRunnerConfig) -> AccelerateConfig:
    """The config of a model that runs on the Accelerate engine, whatever engine it names."""
    if isinstance(config, AccelerateConfig):
        return config
    logger.warning(
        "engine %s serves text generation alone: task %s runs on the Accelerate engine",
        getattr(config, "engine", None),
        config.task,
    )
    if config.tensor_parallel > 1:
        logger.warning("tensor_parallel is ignored: engine accelerate splits no layers")
    shared = config.model_dump(
        include=set(BaseRunnerConfig.model_fields), exclude={"tensor_parallel"}
    )
    return AccelerateConfig(**shared)


class RankedTaskRunner:
    """A model for a task in one rank; see `contracts.TaskRunner`."""

    def __init__(self, config: BaseRunnerConfig, *, program: str) -> None:
        self._config = config
        self._group = RankGroup(
            config, program=program, on_message=self._on_message, on_down=self._on_down
        )
        self._waiting: dict[str, asyncio.Future[list[Finding]]] = {}

    @property
    def name(self) -> str:
        """The name clients call the model by."""
        return self._config.name

    @property
    def task(self) -> str:
        """What the model does."""
        return self._config.task

    @property
    def info(self) -> ModelInfo | None:
        """What the ranks loaded; None until they were ready once."""
        info = self._group.info
        return info if isinstance(info, ModelInfo) else None

    def health(self) -> RunnerHealth:
        """The state right now."""
        return self._group.health()

    async def start(self) -> None:
        """Begin loading and return at once."""
        await self._group.start()

    async def stop(self) -> None:
        """End the rank."""
        await self._group.stop()
        self._on_down("the server is stopping")

    async def run(self, request: TaskRequest) -> list[Finding]:
        """Wait for the answer to one input."""
        self._group.send(RunTask(request))
        future: asyncio.Future[list[Finding]] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        try:
            return await future
        except asyncio.CancelledError:
            if self.health().ready:
                self._group.send(Abort(request.request_id))
            raise
        finally:
            self._waiting.pop(request.request_id, None)

    def _on_message(self, message: RankMessage) -> None:
        match message:
            case Found(request_id, findings):
                self._answer(request_id, findings)
            case Failed(request_id, kind, text, param):
                self._answer(request_id, from_wire(kind, text, param))
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    def _answer(self, request_id: str, answer: list[Finding] | TriptychError) -> None:
        future = self._waiting.get(request_id)
        if future is None or future.done():
            return
        if isinstance(answer, TriptychError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_down(self, reason: str) -> None:
        message = f"model {self.name} went down with the request in flight: {reason}"
        for request_id in list(self._waiting):
            self._answer(request_id, RunnerUnavailable(message))
