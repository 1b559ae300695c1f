"""The rank group lives, dies and comes back as promised; nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.errors import RunnerUnavailable
from runners.contracts.runner import RunnerState
from runners.contracts.text import TextRunner
from tests.support.forked_ranks import forking
from tests.support.generating import collect, failed_start, ids_of, request, serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import alive, descendants, own_ranks, wait_until

# The others come first: while they run, nobody listens to the ranks of the shared runner.
with_shared_runner = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(model: Path) -> AsyncIterator[TextRunner]:
    """One for all tests that have their ranks back at the end."""
    async with serving(model, heartbeat_timeout=3) as ready:
        yield ready


async def went_down(runner: TextRunner, timeout: float) -> str:
    """Wait until it is not ready; returns the reason it gave first."""
    async with asyncio.timeout(timeout):
        while runner.health().ready:
            await asyncio.sleep(0.01)
    return runner.health().detail


async def test_stop_leaves_no_process_and_no_folder(model: Path, tmp_path: Path) -> None:
    before = set(descendants())
    async with serving(model):
        started = set(descendants()) - before
        folders = {Path(p.cmdline()[-2]) for p in own_ranks()}
        assert len(own_ranks()) == 1
        assert all(f.is_dir() and f.stat().st_mode & 0o077 == 0 for f in folders)
        sockets = [f / "channel.sock" for f in folders]
        assert all(s.stat().st_mode & 0o777 == 0o600 for s in sockets)
    # The tokenizers end by themselves at the end of their rank.
    wait_until(lambda: not alive(started), 5, "all processes are gone")
    assert not any(f.exists() for f in folders)


def test_what_is_told_to_a_rank_that_just_died_troubles_nobody(model: Path) -> None:
    async def leave_a_dead_rank() -> None:
        before = own_ranks()
        async with serving(model) as runner:
            options = {"max_new_tokens": 500, "ignore_eos": True}
            streams = [await runner.submit(request("hello", **options)) for _ in range(3)]
            [rank] = [rank for rank in own_ranks() if rank not in before]
            rank.kill()
            wait_until(lambda: alive([rank]) == [], 5, "it is dead")  # unknown to the loop
            for stream in streams:
                await stream.aclose()
                await asyncio.sleep(0)
            await went_down(runner, timeout=2)
            await wait_ready(runner)
            assert runner.health().restarts == 1

    with forking():
        uvloop.run(leave_a_dead_rank())  # BentoML's, which refuses to write where nobody reads


async def test_a_model_that_can_not_load_fails_for_good_with_the_reason(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"not weights")
    health = await failed_start(folder)
    assert "broken cannot be loaded" in health.detail


async def test_a_start_that_takes_too_long_is_ended(model: Path) -> None:
    config, _ = load_setup_config(model, name="slow", overrides={"start_timeout": 0.5})
    runner = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(20):
            while runner.health().state is not RunnerState.RESTARTING:
                await asyncio.sleep(0.01)
        assert runner.health().detail == "not ready within start_timeout (0.5 s)"
    finally:
        await runner.stop()


@with_shared_runner
async def test_killed_while_idle_it_says_why_and_comes_back(
    runner: TextRunner, model: Path
) -> None:
    restarts = runner.health().restarts
    [rank] = own_ranks()
    os.kill(rank.pid, signal.SIGKILL)
    await went_down(runner, timeout=2)
    reasons = set()
    async with asyncio.timeout(60):
        while not runner.health().ready:
            reasons.add(runner.health().detail)
            await asyncio.sleep(0.01)
    assert any("rank 0 was killed by SIGKILL" in r for r in reasons), reasons
    assert runner.health().restarts == restarts + 1
    deltas = await collect(runner, "hello", max_new_tokens=8, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(model, ["hello"], 8)


@with_shared_runner
async def test_killed_midway_fails_what_is_in_flight_at_once(runner: TextRunner) -> None:
    stream = await runner.submit(request("hello", max_new_tokens=500, ignore_eos=True))
    iterator = aiter(stream)
    await anext(iterator)
    [rank] = own_ranks()
    killed_at = time.monotonic()
    os.kill(rank.pid, signal.SIGKILL)
    with pytest.raises(RunnerUnavailable, match="went down with the request in flight"):
        while True:
            await anext(iterator)
    assert time.monotonic() - killed_at < 2
    with pytest.raises(RunnerUnavailable, match="is not ready"):
        await runner.submit(request("hello"))
    await wait_ready(runner)


@with_shared_runner
async def test_a_stopped_rank_is_taken_for_hung(runner: TextRunner) -> None:
    [rank] = own_ranks()
    os.kill(rank.pid, signal.SIGSTOP)
    reason = await went_down(runner, timeout=6)
    assert reason == "rank 0 hangs: no heartbeat for 3 s"
    await wait_ready(runner)
    assert alive([rank]) == []


@with_shared_runner
async def test_ranks_die_with_a_launcher_that_is_killed(runner: TextRunner) -> None:
    [rank] = own_ranks()
    parent = rank.parent()
    assert parent is not None
    parent.kill()
    wait_until(lambda: alive([rank]) == [], 2, "the rank ends with its launcher")
    await went_down(runner, timeout=2)
    await wait_ready(runner)


@with_shared_runner
async def test_the_hosts_own_standstill_is_not_the_ranks(runner: TextRunner) -> None:
    """Longer than heartbeat_timeout, as after SIGSTOP or on a suspended machine."""
    restarts = runner.health().restarts
    stream = await runner.submit(request("hello", max_new_tokens=300, ignore_eos=True))
    time.sleep(5)  # noqa: ASYNC251 - the loop must stand still
    deltas = [delta async for delta in stream]
    assert len(ids_of(deltas)) == 300
    await asyncio.sleep(1)
    assert (runner.health().ready, runner.health().restarts) == (True, restarts)
