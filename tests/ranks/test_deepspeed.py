"""The DeepSpeed engine on real ranks: refusals and faults; http/ has what it generates."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.errors import RunnerUnavailable
from runners.contracts.runner import RunnerState
from tests.support.generating import collect, ids_of, request, serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import own_ranks

pytest.importorskip("deepspeed")

COUNT = 16
PROMPTS = ["the cat sat on", "a long prompt that takes several steps, " * 4]
TWO: dict[str, Any] = {"engine": "deepspeed", "tensor_parallel": 2}


@pytest.mark.parametrize("kind", ["gpt2", "falcon_mq"])
async def test_a_model_that_cannot_be_split_is_refused(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    config, _ = load_setup_config(folder, name=kind, overrides=TWO)
    runner = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(120):
            while runner.health().state is not RunnerState.FAILED:
                await asyncio.sleep(0.05)
        assert "cannot be split over 2 ranks (DeepSpeed's AutoTP: " in runner.health().detail
        assert "engine accelerate" in runner.health().detail
    finally:
        await runner.stop()


async def test_heads_that_the_ranks_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    config, _ = load_setup_config(
        folder, name="llama", overrides={"engine": "deepspeed", "tensor_parallel": 3}
    )
    runner = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(60):
            while runner.health().state is not RunnerState.FAILED:
                await asyncio.sleep(0.05)
        assert "4 attention heads, which tensor_parallel 3 does not" in runner.health().detail
    finally:
        await runner.stop()


async def test_one_rank_is_enough(tmp_path: Path) -> None:
    folder = write_model("opt", tmp_path / "opt")
    async with serving(folder, engine="deepspeed") as runner:
        deltas = await collect(runner, "the cat sat on", max_new_tokens=16, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, ["the cat sat on"], 16)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_rank_fails_what_is_in_flight_and_the_group_comes_back(
    fault: signal.Signals, tmp_path: Path
) -> None:
    folder = write_model("llama", tmp_path / "llama")
    async with serving(folder, **TWO, heartbeat_timeout=3) as runner:
        stream = await runner.submit(request("hello", max_new_tokens=500, ignore_eos=True))
        iterator = aiter(stream)
        await anext(iterator)
        second = next(p for p in own_ranks() if p.environ()["RANK"] == "1")
        lost_at = time.monotonic()
        os.kill(second.pid, fault)
        with pytest.raises(RunnerUnavailable, match="went down with the request in flight"):
            while True:
                await anext(iterator)
        assert time.monotonic() - lost_at < (2 if fault == signal.SIGKILL else 6)
        await wait_ready(runner)
        deltas = await collect(runner, "hello", max_new_tokens=8, ignore_eos=True)
        assert [ids_of(deltas)] == greedy(folder, ["hello"], 8)


async def test_ranks_of_one_machine_are_not_reached_from_outside(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    async with serving(folder, **TWO):
        used = {c.laddr.ip for rank in own_ranks() for c in rank.net_connections("tcp")}
    assert {address.removeprefix("::ffff:") for address in used} == {"127.0.0.1"}


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's operator is for Linux")
@pytest.mark.timeout(600)
async def test_ranks_may_sum_through_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled despite the lock of a killed build; no buffer is left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_model("llama", tmp_path / "llama")
    shared: dict[str, Any] = {**TWO, "shm_collectives": True}

    def buffers() -> set[Path]:
        return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))

    before = buffers()
    async with serving(folder, patience=500, **shared) as runner:
        deltas = await collect(runner, PROMPTS[1], max_new_tokens=COUNT, ignore_eos=True)
        loaded = Path("/proc", str(own_ranks()[0].pid), "maps").read_text()
        assert "deepspeed_shm_comm.so" in loaded
        assert buffers() <= before
    assert [ids_of(deltas)] == greedy(folder, [PROMPTS[1]], COUNT)
    (built,) = (tmp_path / "cache" / "triptych").glob("torch*/deepspeed_shm_comm")
    (built / "lock").touch()
    leftover = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_triptych.4194305_x_0")
    leftover.touch()
    async with serving(folder, **shared) as runner:
        assert not leftover.exists()
        second = next(p for p in own_ranks() if p.environ()["RANK"] == "1")
        second.kill()
        while runner.health().ready:
            await asyncio.sleep(0.05)
        await wait_ready(runner)
        deltas = await collect(runner, PROMPTS[0], max_new_tokens=COUNT, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, [PROMPTS[0]], COUNT)
    assert buffers() <= before
