"""The DeepSpeed engine on two real ranks: the tokens of `generate`, refusals, faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runners import create_runner
from runners.config import load_setup_config
from runners.contracts import RunnerState
from runners.errors import RunnerUnavailable
from tests.support.generating import collect, ids_of, request, serving, wait_ready
from tests.support.models import greedy, write_model
from tests.support.processes import own_ranks

pytest.importorskip("deepspeed")

PROMPTS = ["hello", "the cat sat on", "a long prompt that takes several steps, " * 4, "x", "mat 12"]
COUNT = 16
TWO: dict[str, Any] = {"engine": "deepspeed", "tensor_parallel": 2}
SPLIT = [
    *("llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox", "phi", "falcon", "gptj", "gpt_neo"),
    *("mpt", "gemma", "gemma2", "gemma3", "starcoder2", "mixtral", "bloom", "phi3"),
]


@pytest.mark.parametrize("kind", SPLIT)
async def test_two_ranks_give_the_tokens_of_one(kind: str, tmp_path: Path) -> None:
    """Five prompts at once in chunks, one more that joins late, two that leave."""
    folder = write_model(kind, tmp_path / kind)
    async with serving(folder, **TWO, max_step_tokens=32) as runner:
        assert len(own_ranks()) == 2

        async def late(i: int, prompt: str) -> list[int]:
            await asyncio.sleep(0.03 * i)
            return ids_of(await collect(runner, prompt, max_new_tokens=COUNT, ignore_eos=True))

        async def leaver() -> None:
            stream = await runner.generate(request(PROMPTS[2], max_new_tokens=200, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()

        results = await asyncio.gather(
            *(late(i, p) for i, p in enumerate(PROMPTS)), leaver(), leaver()
        )
    assert results[: len(PROMPTS)] == greedy(folder, PROMPTS, COUNT)


@pytest.mark.parametrize("kind", ["gpt2", "falcon_mq"])
async def test_what_nothing_splits_rightly_is_refused(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    config, _ = load_setup_config(folder, name=kind, overrides=TWO)
    runner = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(120):
            while runner.health().state is not RunnerState.FAILED:
                await asyncio.sleep(0.05)
        assert "can not be split over 2 ranks (DeepSpeed's AutoTP: " in runner.health().detail
        assert "engine accelerate" in runner.health().detail
    finally:
        await runner.stop()


async def test_heads_that_can_not_be_dealt_out_are_refused(tmp_path: Path) -> None:
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
        deltas = await collect(runner, PROMPTS[1], max_new_tokens=COUNT, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, [PROMPTS[1]], COUNT)


@pytest.mark.parametrize("kind", ["opt", "llama"])
async def test_a_torchserve_set_up_runs_as_it_was_published(kind: str, tmp_path: Path) -> None:
    write_model(kind, tmp_path / "checkpoints")
    (tmp_path / "model-config.yaml").write_text(
        """\
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 100
responseTimeout: 120
parallelType: "tp"
deviceType: "gpu"
torchrun:
    nproc-per-node: 2
deepspeed:
    config: ds-config.json
handler:
    model_name: "facebook/opt-30b"
    model_path: "checkpoints"
    max_length: 80
    max_new_tokens: 50
    manual_seed: 40
"""
    )
    (tmp_path / "ds-config.json").write_text(
        json.dumps(
            {
                "dtype": "torch.float16",
                "replace_with_kernel_inject": True,
                "tensor_parallel": {"tp_size": 2},
            }
        )
    )
    async with serving(tmp_path) as runner:
        assert len(own_ranks()) == 2
        assert runner.info is not None
        assert runner.info.engine == "deepspeed"
        deltas = await collect(runner, PROMPTS[1], ignore_eos=True)
    assert [ids_of(deltas)] == greedy(tmp_path / "checkpoints", [PROMPTS[1]], 50)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_rank_fails_what_is_in_flight_and_the_group_comes_back(
    fault: signal.Signals, tmp_path: Path
) -> None:
    folder = write_model("llama", tmp_path / "llama")
    async with serving(folder, **TWO, heartbeat_timeout=3) as runner:
        stream = await runner.generate(request("hello", max_new_tokens=500, ignore_eos=True))
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
async def test_ranks_may_add_up_through_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled beside the lock of a build that was killed; no buffer is left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_model("llama", tmp_path / "llama")
    shared: dict[str, Any] = {**TWO, "shm_collectives": True}

    def buffers() -> set[Path]:
        return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))

    before = buffers()
    async with serving(folder, patience=500, **shared) as runner:
        deltas = await collect(runner, PROMPTS[2], max_new_tokens=COUNT, ignore_eos=True)
        loaded = Path("/proc", str(own_ranks()[0].pid), "maps").read_text()
        assert "deepspeed_shm_comm.so" in loaded
        assert buffers() <= before
    assert [ids_of(deltas)] == greedy(folder, [PROMPTS[2]], COUNT)
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
        deltas = await collect(runner, PROMPTS[1], max_new_tokens=COUNT, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, [PROMPTS[1]], COUNT)
    assert buffers() <= before
