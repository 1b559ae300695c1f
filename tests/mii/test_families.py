"""Every family MII serves: greedy tokens equal `generate`, in chunks of 32, with starved KV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mii.api
import pytest

from runners.engines.mii.fastgen import CountedEngine, PutModel
from runners.engines.mii.patches.loading import load_stand_in
from runners.text.paging.blocks import BLOCK_SIZE
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
            inference_engine=load_stand_in(config),
            tokenizer=Ids(mii.api.load_tokenizer(config)),
            model_config=config,
        )
        preempted: list[Any] = []
        reset = pipeline.reset_request_status
        pipeline.reset_request_status = lambda reset=reset, seen=preempted: seen.append(reset())
        found: dict[int, list[int]] = {}
        give = pipeline._generate_output

        def note(request: Any, found: Any = found, give: Any = give) -> None:
            found[request.uid] = list(request.progress.tokens)
            give(request)

        pipeline._generate_output = note
        pipeline(
            [" ".join(map(str, ids)) for ids in prompts],
            do_sample=False,
            ignore_eos=True,
            max_new_tokens=COUNT,
        )
        assert [found[i] for i in range(len(prompts))] == want
        assert bool(preempted) == (kv_blocks == 2)
        pipeline.destroy()


class Ids:
    """MII's tokenizer, but for prompts that are written as their token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer.tokenizer
        self.vocab_size = tokenizer.vocab_size

    def encode(self, prompt: str) -> Any:
        """The ids in the prompt."""
        import torch

        return torch.tensor(list(map(int, prompt.split())))


@pytest.mark.parametrize("kv_blocks", [8, 2])
def test_our_scheduler_drives_an_engine_of_miis_interface(kv_blocks: int, tmp_path: Path) -> None:
    """As it drives FastGen's on a GPU."""
    folder = write_model("mistral", tmp_path / "mistral")
    stand_in = load_stand_in(model_config(folder, kv_blocks=kv_blocks))
    blocks = int(stand_in.free_blocks[0])
    engine: Any = CountedEngine(PutModel(stand_in), blocks=blocks, block_size=BLOCK_SIZE)
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
    assert int(stand_in.free_blocks[0]) == blocks
    assert engine.free_tokens == engine.total_tokens
