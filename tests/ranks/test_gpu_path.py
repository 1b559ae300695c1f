"""The path of a GPU in rank processes on a CPU: the tokens of `generate`, alone and split."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.generating import collect, ids_of, request, serving
from tests.support.models import greedy, write_model

pytestmark = pytest.mark.usefixtures("forked_ranks")

PROMPTS = ["hello", "a long prompt that takes several steps, " * 4, "x", "the " * 40]
COUNT = 24


@pytest.mark.parametrize(
    ("kind", "ranks"), [("llama", 1), ("bloom", 1), ("llama", 2), ("opt", 2), ("bloom", 2)]
)
async def test_prompts_at_once_equal_generate(kind: str, ranks: int, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    engine = "accelerate" if ranks == 1 else "deepspeed"
    async with serving(
        folder,
        engine=engine,
        tensor_parallel=ranks,
        attention_kernel="torch",
        max_step_tokens=32,
        dtype="float32",
    ) as runner:
        # A client that leaves while a step is under way.
        stream = await runner.submit(request("x", max_new_tokens=100, ignore_eos=True))
        await anext(aiter(stream))
        await stream.aclose()
        deltas = await asyncio.gather(
            *(collect(runner, p, max_new_tokens=COUNT, ignore_eos=True) for p in PROMPTS)
        )
        seeded = [
            ids_of(await collect(runner, "x", max_new_tokens=8, temperature=1.0, seed=4))
            for _ in range(2)
        ]
    assert [ids_of(each) for each in deltas] == greedy(folder, PROMPTS, COUNT)
    assert seeded[0] == seeded[1]
