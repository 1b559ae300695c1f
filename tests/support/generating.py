"""Driving a TextRunner in tests."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.runner import Runner, RunnerHealth, RunnerState
from runners.contracts.text import GenerationRequest, Prompt, SamplingParams, TextDelta, TextRunner
from runners.host import group

_ids = itertools.count()


def request(prompt: Prompt, **sampling: Any) -> GenerationRequest:
    """A request with a fresh id."""
    return GenerationRequest(
        request_id=f"test-{next(_ids)}", prompt=prompt, sampling=SamplingParams(**sampling)
    )


async def collect(runner: TextRunner, prompt: Prompt, **sampling: Any) -> list[TextDelta]:
    """All deltas of one generation."""
    async with await runner.submit(request(prompt, **sampling)) as stream:
        return [delta async for delta in stream]


def ids_of(deltas: list[TextDelta]) -> list[int]:
    """All token ids of a generation."""
    return [token for delta in deltas for token in delta.token_ids]


def text_of(deltas: list[TextDelta]) -> str:
    """The whole text of a generation."""
    return "".join(delta.text for delta in deltas)


async def wait_ready(runner: Runner[Any, Any], timeout: float = 120) -> None:
    """Until the runner serves. Raises: AssertionError if it fails or takes longer."""
    async with asyncio.timeout(timeout):
        while not runner.health().ready:
            assert runner.health().state is not RunnerState.FAILED, runner.health().detail
            await asyncio.sleep(0.02)


async def failed_start(folder: Path, *, patience: float = 90, **overrides: Any) -> RunnerHealth:
    """The health of a runner whose start must fail for good within `patience` seconds."""
    config, _ = load_setup_config(
        folder, name=folder.name, overrides={"num_threads": 1} | overrides
    )
    runner: Runner[Any, Any] = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(patience):
            while (health := runner.health()).state is not RunnerState.FAILED:
                assert not health.ready
                await asyncio.sleep(0.02)
        return health
    finally:
        await runner.stop()


@asynccontextmanager
async def serving(
    folder: Path, *, patience: float = 120, **overrides: object
) -> AsyncIterator[TextRunner]:
    """A started runner for a model folder, ready within `patience` seconds."""
    config, _ = load_setup_config(
        folder, name=folder.name, overrides={"num_threads": 1} | overrides
    )
    async with started(create_runner(config), patience=patience) as runner:
        yield runner


@asynccontextmanager
async def started(runner: TextRunner, *, patience: float = 120) -> AsyncIterator[TextRunner]:
    """The runner, started, ready within `patience` seconds, and stopped at the end.

    If it goes down, it is restarted without a pause.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "HEALTHY_S", 0.0)
        await runner.start()
        try:
            await wait_ready(runner, patience)
            yield runner
        finally:
            await runner.stop()
