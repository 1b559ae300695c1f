"""MII on its own kernels: FastGen in our ranks and as a deployment. NOT YET RUN: there was no GPU.

`pytest -m gpu tests/gpu` builds the kernels first, which takes minutes.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mii.conftest import Scripts, cache, scripts
from tests.support.generating import collect, ids_of, serving, text_of
from tests.support.models import write_tokenizer

__all__ = ["cache", "scripts"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNT = 16
PROMPTS = ["hello", "the cat sat on", "a long prompt that takes several steps, " * 4, "x"]
FAMILIES = ["llama", "mistral", "qwen2", "opt", "phi", "phi3"]


def write_model(kind: str, folder: Path) -> Path:
    """A small model of FastGen's shapes (heads of 64 or 128), in bfloat16, logits far apart."""
    import transformers as tf

    width: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "ffn_dim": 1024,
        "word_embed_proj_dim": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8 if kind in ("phi", "phi3") else 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(len(kind))
    config = tf.AutoConfig.for_model(kind, **width)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.generation_config = tf.GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def on_gpu(folder: Path, prompts: list[str], count: int) -> list[list[int]]:
    """`model.generate(do_sample=False)` in the same type, on the same device."""
    import transformers as tf

    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.to("cuda")
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to("cuda")
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=count)
        found.append(whole[0, inputs.input_ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("mode", ["pipeline", "persistent"])
async def test_greedy_tokens_equal_generate(
    kind: str, mode: str, tmp_path: Path, cache: Path
) -> None:
    folder = write_model(kind, tmp_path / kind)
    async with serving(folder, engine="mii", mii={"mode": mode}, max_step_tokens=64) as runner:
        assert runner.info is not None
        deltas = await asyncio.gather(
            *(collect(runner, p, max_new_tokens=COUNT, ignore_eos=True) for p in PROMPTS)
        )
    assert [ids_of(each) for each in deltas] == on_gpu(folder, PROMPTS, COUNT)


async def test_features_of_the_other_engines_hold(tmp_path: Path, cache: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    async with serving(folder, engine="mii", max_kv_tokens=256) as runner:
        sampled = {"temperature": 1.0, "seed": 7, "max_new_tokens": 12, "ignore_eos": True}
        once, again = [await collect(runner, "mat", **sampled) for _ in range(2)]
        assert ids_of(once) == ids_of(again)
        whole = text_of(await collect(runner, "hello", max_new_tokens=24, ignore_eos=True))
        stop = whole[5:8]
        cut = text_of(await collect(runner, "hello", max_new_tokens=24, stop=[stop]))
        assert cut == whole[: whole.index(stop)]
        first = (await collect(runner, "hello", max_new_tokens=1, logprobs=2))[0]
        assert first.logprobs is not None
        assert len(first.logprobs[0].top) == 2


def test_miis_own_pipeline(tmp_path: Path, scripts: Scripts) -> None:
    folder = write_model("llama", tmp_path / "llama")
    printed = scripts.run(
        f"""
import runners.engines.mii.patches
import mii
pipe = mii.pipeline("{folder}")
answer = pipe("hello", do_sample=False, ignore_eos=True, max_new_tokens=8)[0]
print("FOUND", answer.generated_length)
""",
        timeout=1200,
    )
    assert re.search(r"FOUND 8\b", printed)
