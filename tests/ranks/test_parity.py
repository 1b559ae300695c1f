"""Greedy tokens of the Accelerate engine equal `model.generate(do_sample=False)`, all of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.generating import collect, ids_of, request, serving, text_of
from tests.support.models import greedy, write_model

pytestmark = pytest.mark.usefixtures("forked_ranks")

PROMPTS = [
    "hello",
    "the cat sat on",
    "world",
    "a long prompt that takes several steps to read, " * 4,
    "x",
    "mat the hello 123",
    "cats and dogs",
    "the " * 40,
]
COUNT = 24


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom", "gpt2", "qwen2", "mistral"])
async def test_eight_prompts_at_once_equal_generate(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    async with serving(folder) as runner:
        deltas = await asyncio.gather(
            *(collect(runner, p, max_new_tokens=COUNT, ignore_eos=True) for p in PROMPTS)
        )
    assert [ids_of(d) for d in deltas] == greedy(folder, PROMPTS, COUNT)


async def test_chunked_prompts_joins_and_aborts_leave_the_others_alone(tmp_path: Path) -> None:
    folder = write_model("mistral", tmp_path / "mistral")
    async with serving(folder, max_step_tokens=16, max_batch_size=4) as runner:

        async def late(i: int, prompt: str) -> list[int]:
            await asyncio.sleep(0.02 * i)
            return ids_of(await collect(runner, prompt, max_new_tokens=COUNT, ignore_eos=True))

        async def leaver() -> None:
            stream = await runner.submit(request(PROMPTS[3], max_new_tokens=200, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()

        results = await asyncio.gather(
            *(late(i, p) for i, p in enumerate(PROMPTS)), leaver(), leaver()
        )
    assert results[: len(PROMPTS)] == greedy(folder, PROMPTS, COUNT)


async def test_disk_offload_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    weights = (folder / "model.safetensors").stat().st_size
    async with serving(
        folder, max_memory={"cpu": f"{weights * 2 // 3 // 1024}KiB"}, offload_folder="offload"
    ) as runner:
        assert runner.info is not None
        assert "disk" in runner.info.devices
        assert "cpu" in runner.info.devices
        deltas = await asyncio.gather(
            *(collect(runner, p, max_new_tokens=COUNT, ignore_eos=True) for p in PROMPTS)
        )
    assert [ids_of(d) for d in deltas] == greedy(folder, PROMPTS, COUNT)


async def test_everything_on_disk_still_answers(tmp_path: Path) -> None:
    folder = write_model("gpt2", tmp_path / "gpt2")
    async with serving(folder, device_map="disk", offload_folder="offload") as runner:
        deltas = await collect(runner, PROMPTS[1], max_new_tokens=COUNT, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, [PROMPTS[1]], COUNT)


async def test_token_prompt_and_text_prompt_agree(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    async with serving(folder) as runner:
        ids = await runner.tokenize("the cat sat")
        assert await runner.detokenize(ids, skip_special_tokens=True) == "the cat sat"
        by_text = await collect(runner, "the cat sat", max_new_tokens=8, ignore_eos=True)
        by_ids = await collect(runner, ids, max_new_tokens=8, ignore_eos=True)
    assert ids_of(by_text) == ids_of(by_ids)
    assert text_of(by_text) == text_of(by_ids)
