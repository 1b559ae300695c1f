"""A model over two ranks as the launcher starts them: what they listen on, and a lost rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runners.contracts.errors import RunnerUnavailable
from runners.contracts.text import TextRunner
from tests.support.generating import collect, ids_of, request, serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import own_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(folder: Path) -> AsyncIterator[TextRunner]:
    two: dict[str, Any] = {"engine": "deepspeed", "tensor_parallel": 2}
    async with serving(folder, **two, heartbeat_timeout=3) as ready:
        yield ready


async def test_ranks_of_one_machine_are_not_reached_from_outside(runner: TextRunner) -> None:
    used = {c.laddr.ip for rank in own_ranks() for c in rank.net_connections("tcp")}
    assert {address.removeprefix("::ffff:") for address in used} == {"127.0.0.1"}


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_rank_fails_what_is_in_flight_and_the_group_comes_back(
    runner: TextRunner, folder: Path, fault: signal.Signals
) -> None:
    stream = await runner.submit(request("hello", max_new_tokens=500, ignore_eos=True))
    iterator = aiter(stream)
    await anext(iterator)
    second = next(p for p in own_ranks() if p.environ()["RANK"] == "1")
    lost_at = time.monotonic()
    os.kill(second.pid, fault)
    with pytest.raises(RunnerUnavailable, match="went down with the request in flight: rank 1 "):
        while True:
            await anext(iterator)
    assert time.monotonic() - lost_at < (2 if fault == signal.SIGKILL else 6)
    await wait_ready(runner)
    deltas = await collect(runner, "hello", max_new_tokens=8, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, ["hello"], 8)
