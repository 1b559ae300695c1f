"""Every family MII serves: greedy tokens equal `generate`, in chunks of 32, with starved KV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mii.api
import pytest

from runners.engines.mii.fastgen import FastGenEngine, FastGenModel
from runners.engines.mii.patches.loading import load_cpu_engine
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.samplers import HostSampler
from tests.support.mii import model_config
from tests.support.models import greedy, write_model
from tests.support.scheduling import Run, sequence

FAMILIES = [
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "falcon",
]
COUNT = 40


def prompts_of(folder: Path) -> list[list[int]]:
    """Five prompts of 2 to 130 tokens."""
    lengths = (2, 9, 33, 64, 130)
    return [[(7 * i + 3 * k) % 300 + 2 for i in range(n)] for k, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_five_prompts_at_once_equal_generate(kind: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    prompts = prompts_of(folder)
    want = greedy(folder, prompts, COUNT)
    for kv_blocks in (8, 2):
        config = model_config(folder, kv_blocks=kv_blocks, step=32)
        pipeline = mii.api.MIIPipeline(
            inference_engine=load_cpu_engine(config),
            tokenizer=Ids(mii.api.load_tokenizer(config)),
            model_config=config,
        )
        preempted: list[Any] = []
        reset = pipeline.reset_request_status
        pipeline.reset_request_status = lambda reset=reset, seen=preempted: seen.append(reset())
        generated: dict[int, list[int]] = {}
        original = pipeline._generate_output

        def record(request: Any, generated: Any = generated, original: Any = original) -> None:
            generated[request.uid] = list(request.generation.tokens)
            original(request)

        pipeline._generate_output = record
        pipeline(
            [" ".join(map(str, ids)) for ids in prompts],
            do_sample=False,
            ignore_eos=True,
            max_new_tokens=COUNT,
        )
        assert [generated[i] for i in range(len(prompts))] == want
        assert bool(preempted) == (kv_blocks == 2)
        pipeline.destroy()


class Ids:
    """MII's tokenizer for prompts that are written as token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer.tokenizer
        self.vocab_size = tokenizer.vocab_size

    def encode(self, prompt: str) -> Any:
        """The ids in the prompt."""
        import torch

        return torch.tensor(list(map(int, prompt.split())))


@pytest.mark.parametrize("kv_blocks", [8, 2])
def test_triptychs_scheduler_drives_miis_engine(kv_blocks: int, tmp_path: Path) -> None:
    """As it drives FastGen's engine on a GPU."""
    folder = write_model("mistral", tmp_path / "mistral")
    cpu_engine = load_cpu_engine(model_config(folder, kv_blocks=kv_blocks))
    blocks = int(cpu_engine.free_blocks[0])
    engine: Any = FastGenEngine(
        FastGenModel(cpu_engine), HostSampler(), blocks=blocks, block_size=BLOCK_SIZE
    )
    run = Run(engine, max_step_tokens=32)
    prompts = prompts_of(folder)
    for i, prompt in enumerate(prompts):
        run.scheduler.add(sequence(str(i), prompt, COUNT))
    run.step()
    run.step()
    run.scheduler.abort("1")
    run.drain()
    want = greedy(folder, prompts, COUNT)
    assert [run.tokens[i] for i in "0234"] == [want[int(i)] for i in "0234"]
    assert bool(run.scheduler.preemptions) == (kv_blocks == 2)
    engine.idle()
    assert int(cpu_engine.free_blocks[0]) == blocks
    assert engine.free_tokens == engine.total_tokens
