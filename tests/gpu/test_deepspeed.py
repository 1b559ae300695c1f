"""The DeepSpeed engine on GPUs: NCCL between ranks, the tokens of `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.generating import collect, ids_of, serving
from tests.support.models import greedy, write_model

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

PROMPTS = ["the cat sat on", "a long prompt that takes several steps, " * 4]


async def tokens(folder: Path, **options: Any) -> list[list[int]]:
    async with serving(folder, engine="deepspeed", dtype="float32", **options) as runner:
        assert runner.info is not None
        assert runner.info.devices[0].startswith("cuda")
        return [
            ids_of(await collect(runner, prompt, max_new_tokens=16, ignore_eos=True))
            for prompt in PROMPTS
        ]


@pytest.mark.parametrize("inject", [False, True])
async def test_one_gpu_serves_what_a_config_for_one_says(inject: bool, tmp_path: Path) -> None:
    folder = write_model("opt", tmp_path / "opt")
    config = {"replace_with_kernel_inject": inject, "tensor_parallel": {"tp_size": 1}}
    assert await tokens(folder, deepspeed=config) == greedy(folder, PROMPTS, 16)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("kind", ["llama", "opt", "bloom", "phi3"])
async def test_two_gpus_give_the_tokens_of_one(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    assert await tokens(folder, tensor_parallel=2) == greedy(folder, PROMPTS, 16)


async def test_more_ranks_than_gpus_are_refused_with_a_sentence(tmp_path: Path) -> None:
    many = 2 * torch.cuda.device_count()
    folder = write_model("llama", tmp_path / "llama")
    with pytest.raises(AssertionError, match=f"{many} ranks on this machine need as many GPUs"):
        await tokens(folder, tensor_parallel=many)
