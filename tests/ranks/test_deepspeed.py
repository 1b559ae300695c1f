"""The DeepSpeed engine: two ranks give the tokens of `generate`, or say why they cannot."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from model_choice import chosen_runners
from model_store_scripts import import_model
from runners.protocol.cache import cache_folder
from runners.text.cpu import load_kernels
from settings import Settings
from tests.support.generating import (
    collect,
    failed_start,
    ids_of,
    request,
    serving,
    started,
    wait_ready,
)
from tests.support.model_store import edit_json, pickled, store_at
from tests.support.models import greedy, write_model
from tests.support.processes import own_ranks
from tests.support.torchserve import published

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("forked_ranks")

COUNT = 16
PROMPTS = ["the cat sat on", "a long prompt that takes several steps, " * 4]
CLIENTS = ["hello", *PROMPTS, "x", "mat 12"]
SPLIT = [
    *("llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox", "phi", "falcon", "gptj", "gpt_neo"),
    *("mpt", "gemma", "gemma2", "gemma3", "starcoder2", "mixtral", "bloom", "phi3"),
]
TWO: dict[str, Any] = {"engine": "deepspeed", "tensor_parallel": 2}


@pytest.mark.parametrize("kind", SPLIT)
async def test_two_ranks_give_the_tokens_of_one(kind: str, tmp_path: Path) -> None:
    """Five prompts at once in chunks, each a little later; two clients more that leave."""
    folder = write_model(kind, tmp_path / kind)
    async with serving(folder, **TWO, max_step_tokens=32) as runner:
        assert len(own_ranks()) == 2

        async def late(i: int, prompt: str) -> list[int]:
            await asyncio.sleep(0.03 * i)
            return ids_of(await collect(runner, prompt, max_new_tokens=COUNT, ignore_eos=True))

        async def leaver() -> int:
            left = request(CLIENTS[2], max_new_tokens=200, ignore_eos=True)
            async with await runner.submit(left) as stream:
                async for delta in stream:
                    return len(delta.token_ids)
            return 0

        results, counts = await asyncio.gather(
            asyncio.gather(*(late(i, prompt) for i, prompt in enumerate(CLIENTS))),
            asyncio.gather(leaver(), leaver()),
        )
        assert all(0 < count < 200 for count in counts)
        assert results == greedy(folder, CLIENTS, COUNT)
        async with asyncio.timeout(10):  # those who left are gone
            while runner.health().running:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("source", ["bin shards", "safetensors", "folder"])
@pytest.mark.parametrize("kind", ["opt", "llama"])
async def test_torchserves_set_up_runs_as_it_was_published(
    kind: str, source: str, tmp_path: Path
) -> None:
    """From the model store, converted at import or not, and straight from its folder."""
    folder = published(tmp_path / "published")
    expected = greedy(write_model(kind, folder / "checkpoints"), CLIENTS[:2], 50, dtype="float16")
    with store_at(tmp_path / "home"):
        chosen = str(folder)
        if source != "folder":
            chosen = "published"
            convert = ["--convert-checkpoints"] if source == "bin shards" else []
            if convert:
                pickled(folder / "checkpoints", shards=3)
            assert import_model.main([str(folder), "--name", chosen, *convert]) == 0
        runner = chosen_runners(chosen, "", Settings()).text
    assert runner is not None
    async with started(runner):
        assert len(own_ranks()) == 2
        answers = [await collect(runner, prompt, ignore_eos=True) for prompt in CLIENTS[:2]]
        assert [ids_of(answer) for answer in answers] == expected


@pytest.mark.parametrize("kind", ["gpt2", "falcon_mq"])
async def test_a_model_that_cannot_be_split_is_refused(kind: str, tmp_path: Path) -> None:
    health = await failed_start(write_model(kind, tmp_path / kind), **TWO)
    assert "cannot be split over 2 ranks (DeepSpeed's AutoTP: " in health.detail
    assert "engine accelerate" in health.detail


async def test_heads_that_the_ranks_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    health = await failed_start(folder, engine="deepspeed", tensor_parallel=3)
    assert "4 attention heads, which tensor_parallel 3 does not" in health.detail


async def test_fewer_key_value_heads_than_ranks_are_refused(tmp_path: Path) -> None:
    """As in Gemma 2B; such a rank would have none."""
    folder = write_model("llama", tmp_path / "llama")
    edit_json(folder / "config.json", num_key_value_heads=1)
    health = await failed_start(folder, **TWO)
    assert "1 key-value heads (num_key_value_heads), fewer than tensor_parallel" in health.detail


async def test_one_rank_is_enough(tmp_path: Path) -> None:
    folder = write_model("opt", tmp_path / "opt")
    async with serving(folder, engine="deepspeed") as runner:
        deltas = await collect(runner, "the cat sat on", max_new_tokens=16, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, ["the cat sat on"], 16)


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's operator is for Linux")
@pytest.mark.timeout(600)
async def test_ranks_may_sum_through_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled beside the lock of a build that was killed; no buffer is left behind."""
    load_kernels()  # which are not what is compiled here
    kernels = list(cache_folder().glob("kernels-*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in kernels:
        shutil.copy(file, cache_folder())
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
        own_ranks()[1].kill()
        while runner.health().ready:
            await asyncio.sleep(0.05)
        await wait_ready(runner)
        deltas = await collect(runner, PROMPTS[0], max_new_tokens=COUNT, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, [PROMPTS[0]], COUNT)
    assert buffers() <= before
