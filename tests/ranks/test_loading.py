"""What a model folder may be like: odd ones are served rightly or refused with a sentence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runners import create_runner
from runners.config.files import load_setup_config
from runners.contracts.errors import ContextLengthExceeded, InvalidRequest
from runners.contracts.runner import RunnerState
from runners.contracts.text import ChatMessage, ChatPrompt
from tests.support.generating import collect, failed_start, ids_of, serving, text_of
from tests.support.model_store import edit_json
from tests.support.models import EOS, greedy, write_model

pytestmark = pytest.mark.usefixtures("forked_ranks")


def without_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {}}')


REFUSALS: list[tuple[str, Callable[[Path], Any], dict[str, object], str]] = [
    ("missing tensor", without_tensor, {}, "lacks 1 of the weights that LlamaForCausalLM needs"),
    (
        "unknown architecture",
        lambda f: edit_json(f / "config.json", model_type="foo", architectures=["Foo"]),
        {},
        "cannot be loaded",
    ),
    (
        "wrong shapes",
        lambda f: edit_json(f / "config.json", intermediate_size=96),
        {},
        "cannot be loaded",
    ),
    ("damaged tokenizer", with_damaged_tokenizer, {}, "the tokenizer of odd cannot be loaded"),
    ("absent GPU", lambda _: None, {"device_map": {"": 7}}, "CUDA device 7 does not exist"),
]


@pytest.mark.parametrize(
    ("spoil", "overrides", "sentence"),
    [case[1:] for case in REFUSALS],
    ids=[case[0] for case in REFUSALS],
)
async def test_what_can_never_work_is_refused_at_once(
    tmp_path: Path, spoil: Callable[[Path], Any], overrides: dict[str, Any], sentence: str
) -> None:
    folder = write_model("llama", tmp_path / "odd")
    spoil(folder)
    health = await failed_start(folder, **overrides)
    assert sentence in health.detail
    assert health.restarts == 0


async def test_end_tokens_outside_the_vocabulary_do_no_harm(tmp_path: Path) -> None:
    folder = write_model("gpt2", tmp_path / "gpt2")
    edit_json(folder / "generation_config.json", eos_token_id=[50256, -1])
    async with serving(folder) as runner:
        deltas = await collect(runner, "hello", max_new_tokens=6, min_new_tokens=3)
    assert [ids_of(deltas)] == greedy(folder, ["hello"], 6)


async def test_limits_for_gpus_that_are_not_there_do_not_push_all_to_disk(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    async with serving(folder, max_memory={"0": "10GiB"}) as runner:
        assert runner.info is not None
        assert "disk" not in runner.info.devices


SIXTEEN_BITS: list[tuple[str, dict[str, Any]]] = [
    ("float16", {}),
    ("bfloat16", {}),
    ("bfloat16", {"dtype": "float16"}),
    ("float32", {"engine": "mii", "dtype": "float16"}),
    ("bfloat16", {"engine": "deepspeed", "tensor_parallel": 2}),
    ("float32", {"engine": "deepspeed", "tensor_parallel": 2, "deepspeed": {"dtype": "fp16"}}),
]


@pytest.mark.parametrize(("stored", "options"), SIXTEEN_BITS)
async def test_sixteen_bit_weights_are_computed_in_float32_on_a_cpu(
    stored: str, options: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    folder = write_model("llama", tmp_path / "llama", dtype=getattr(torch, stored))
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")  # older checkpoints do not say
    (folder / "config.json").write_text(json.dumps(config))
    dtype = "float16" if options and stored != "bfloat16" else options.get("dtype", stored)
    async with serving(folder, **options) as runner:
        assert runner.info is not None
        assert runner.info.dtype == dtype
        deltas = await collect(runner, "the cat sat", max_new_tokens=24, ignore_eos=True)
    assert [ids_of(deltas)] == greedy(folder, ["the cat sat"], 24, dtype=dtype)


def quantize_to_fp8(folder: Path, *, block: int = 32) -> None:
    """Store the projections in float8 with a scale for each block, as DeepSeek's checkpoints."""
    import torch

    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = weight.to(torch.bfloat16)
            continue
        parts = [rows.split(block, dim=1) for rows in weight.split(block)]
        scales = [[float(part.abs().max()) / 448 for part in row] for row in parts]
        scaled = [
            torch.cat([part / scale for part, scale in zip(*pair, strict=True)], dim=1)
            for pair in zip(parts, scales, strict=True)
        ]
        stored[name] = torch.cat(scaled).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", ".weight_scale_inv")] = torch.tensor(scales)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    quantization["weight_block_size"] = [block, block]  # type: ignore[assignment]
    edit_json(folder / "config.json", dtype="bfloat16", quantization_config=quantization)


async def test_fp8_weights_are_dequantized_on_a_cpu(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    quantize_to_fp8(folder)
    async with serving(folder) as runner:
        deltas = await collect(runner, "the cat sat", max_new_tokens=12, ignore_eos=True)
    # Widened as here: bfloat16 arithmetic breaks near-ties in another way.
    model: Any = AutoModelForCausalLM.from_pretrained(folder).float()
    model.generation_config.eos_token_id = None
    inputs = AutoTokenizer.from_pretrained(folder)("the cat sat", return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=EOS)
    assert ids_of(deltas) == out[0, inputs.input_ids.shape[1] :].tolist()


async def test_ends_and_defaults(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    async with serving(folder, max_kv_tokens=70, max_length=30) as runner:
        assert runner.info is not None
        assert (
            runner.info.max_model_len == 65
        )  # two blocks of 32, and the token that is not fed back
        [free] = greedy(folder, ["hello"], 12)
        # The end token as a stop string: special tokens have no text to be found in.
        stopped = await collect(runner, "hello", max_new_tokens=12, ignore_eos=True, stop=["</s>"])
        cut = free[: free.index(EOS) + 1] if EOS in free else free
        assert ids_of(stopped) == cut
        # Defaults are cut to what fits; what was asked for is refused instead.
        deltas = await collect(runner, [5] * 29, ignore_eos=True, default_new_tokens=40)
        assert len(ids_of(deltas)) == 36
        deltas = await collect(runner, [5] * 5, ignore_eos=True, min_new_tokens=35)
        assert len(ids_of(deltas)) == 35
        with pytest.raises(ContextLengthExceeded, match="at most 36 tokens fit"):
            await collect(runner, [5] * 29, max_new_tokens=37)
        with pytest.raises(ContextLengthExceeded, match="at most 30 are allowed"):
            await collect(runner, [5] * 31)
        with pytest.raises(ContextLengthExceeded, match="characters"):
            await collect(runner, "x" * 100_000)


async def test_a_token_without_an_embedding_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(400)])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    async with serving(folder) as runner:
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            await collect(runner, "hello <extra399>", max_new_tokens=2)
        asked = [ChatMessage(role="user", content="<extra399>")]
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            await collect(runner, ChatPrompt(messages=asked), max_new_tokens=2)
        assert len(ids_of(await collect(runner, "hello", max_new_tokens=3, ignore_eos=True))) == 3


async def test_a_template_that_fails_is_the_conversations_fault(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0]['content'] + 1 if messages|length > 1 else messages[0]['content'] }}"
    )
    one = [ChatMessage(role="user", content="hello")]
    async with serving(folder) as runner:
        assert (
            text_of(await collect(runner, ChatPrompt(messages=one), max_new_tokens=2)) is not None
        )
        with pytest.raises(Exception, match="chat template fails on these messages: TypeError"):
            await collect(runner, ChatPrompt(messages=one * 2), max_new_tokens=2)


async def test_a_socket_path_that_is_too_long_is_said_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setattr("runners.protocol.folders._folders", [])
    config, _ = load_setup_config(write_model("llama", tmp_path / "llama"), name="m")
    runner = create_runner(config)
    await runner.start()
    try:
        async with asyncio.timeout(20):
            while runner.health().state is not RunnerState.RESTARTING:
                await asyncio.sleep(0.01)
        assert "set TMPDIR to a shorter one" in runner.health().detail
    finally:
        await runner.stop()
    [own] = long.iterdir()  # until this process ends
    assert list(own.iterdir()) == []
