"""A runner with its ranks, as the server starts it, without the server."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.session import supported

START_TIMEOUT_S = 480
POLL_S = 0.02
_ids = itertools.count()


class StartFailed(Exception):
    """The runner gave up; the message is its health's."""


class Answer(NamedTuple):
    """The tokens of a request, when it was sent, and when each token came."""

    tokens: list[int]
    sent: float
    times: list[float]

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent


class Served(NamedTuple):
    """A ready runner, and how long its start took in seconds."""

    runner: Any
    start_s: float

    async def generate(self, prompt: list[int], count: int) -> Answer:
        """`count` greedy tokens. Raises: the error of the request."""
        answer = Answer([], time.perf_counter(), [])
        async for delta in self.deltas(prompt, count):
            answer.tokens.extend(delta.token_ids)
            answer.times.extend([time.perf_counter()] * len(delta.token_ids))
        return answer

    async def deltas(self, prompt: list[int], count: int, **sampling: Any) -> AsyncIterator[Any]:
        """The deltas of a request, which is greedy unless `sampling` says something else."""
        from runners.contracts.text import GenerationRequest, SamplingParams

        options = {"max_new_tokens": count, "temperature": 0.0, "ignore_eos": True} | sampling
        request = GenerationRequest(
            request_id=f"check-{next(_ids)}", prompt=prompt, sampling=SamplingParams(**options)
        )
        async with await self.runner.submit(request) as stream:
            async for delta in stream:
                yield delta

    async def generate_all(self, prompts: list[list[int]], count: int) -> list[Answer]:
        """The answers to prompts that are sent at once."""
        return list(await asyncio.gather(*(self.generate(p, count) for p in prompts)))


@asynccontextmanager
async def serving(
    device: Device, folder: Path, *, engine: str, **options: Any
) -> AsyncIterator[Served]:
    """A ready runner of an engine. Raises: StartFailed, TimeoutError."""
    from runners import create_runner
    from runners.config.model import validate
    from runners.contracts.runner import RunnerState

    dry = {"num_threads": 1} if device.dry else {}
    if device.dry and engine != "mii":
        dry |= supported(attention_kernel="torch")
    values = {
        "engine": engine,
        "name": folder.name,
        "model_path": folder,
        "start_timeout": START_TIMEOUT_S,
    }
    runner = create_runner(validate(values | dry | options))
    start = time.perf_counter()
    await runner.start()
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (health := runner.health()).ready:
                if health.state is RunnerState.FAILED:
                    raise StartFailed(str(health.detail))
                await asyncio.sleep(POLL_S)
        yield Served(runner, time.perf_counter() - start)
    finally:
        await runner.stop()
