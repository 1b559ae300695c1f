"""Part d: MII. FastGen's kernels, the tokens of `generate`, and the speed next to MII's scheduler.

On a CPU, MII's engine is the stand-in of `runners.engines.mii`, which needs no kernels.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.models import SEED, SHAPES, written
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.peers import in_new_process
from benchmarks.gpu_check.recorder import Skipped
from benchmarks.gpu_check.serving import Served, serving
from benchmarks.gpu_check.session import Output
from benchmarks.gpu_check.throughput import prompts_of
from benchmarks.gpu_check.tokens import compare, generate, make_prompts
from tests.support.models import VOCAB

FAMILIES = ("llama", "mistral", "qwen2", "opt", "phi", "phi3")
MODES = ("pipeline", "persistent")
COUNTS = (1, 16, 64)
PROMPT, OUTPUT = 128, 64
BUILDERS = ("RaggedUtils", "RaggedOps", "InferenceCore", "InferenceCutlass")
PACKAGES = {"deepspeed": "deepspeed", "mii": "deepspeed-mii"}
MIDDLE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
}
"""Llama 3.2 1B's shape, except for the vocabulary."""


def run(check: Context) -> None:
    """Build, compare, measure. Raises: Skipped."""
    require(PACKAGES if check.device.dry else PACKAGES | {"dskernels": "deepspeed-kernels"})
    os.environ.setdefault("MII_CACHE_PATH", str(check.folder / "mii"))
    if not check.device.dry:
        build(check)
    for kind in check.device.pick(FAMILIES, ()):
        # The other families differ in the model only, not in how a deployment is run.
        for mode in MODES if kind == "llama" else MODES[:1]:
            _serve(check, family_model(kind, check.folder), mode)
        check.device.release()
    folder = _middle_model(check.device, check.folder)
    speeds = {
        mode: _serve(check, folder, mode, measures=True)
        for mode in check.device.pick(MODES, MODES[:1])
    }
    speeds["mii.pipeline"] = dict(_pipeline_speeds(check.device, folder))
    for name, rates in speeds.items():
        check.record.figure(f"{name} tokens_per_second", rates)
    for count, stock in speeds["mii.pipeline"].items():
        rate = speeds["pipeline"].get(count, float("nan"))
        check.record.figure(f"pipeline, times mii.pipeline, {count} sequences", rate / stock)


def require(packages: dict[str, str]) -> None:
    """Raises: Skipped if a module is missing; `packages` has the name of its package."""
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def build(check: Context) -> None:
    """Compile FastGen's kernels for this card, into a folder that later runs find."""
    folder = check.folder / "torch_extensions"
    folder.mkdir(parents=True, exist_ok=True)
    for lock in folder.glob("*/lock"):
        lock.unlink()  # of a build that was ended: the next one would wait for it
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    builders = importlib.import_module("deepspeed.ops.op_builder")
    for name in BUILDERS:
        start = time.perf_counter()
        getattr(builders, f"{name}Builder")().load(verbose=False)
        check.record.figure(f"build of {name}, s", time.perf_counter() - start)


def family_model(kind: str, folder: Path) -> Path:
    """A small model in bfloat16 whose heads have a size that FastGen supports."""

    def write(target: Path) -> None:
        torch.manual_seed(SEED + len(kind))
        options: dict[str, Any] = {
            "vocab_size": VOCAB,
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
        config = tf.AutoConfig.for_model(kind, **options)
        _save(config, target, scale=3)

    return written(folder / f"fastgen-{kind}", write)


def _middle_model(device: Device, folder: Path) -> Path:
    def write(target: Path) -> None:
        torch.manual_seed(SEED)
        with torch.device(device.target):
            config = SHAPES["llama"]() if device.dry else tf.LlamaConfig(**MIDDLE)
            _save(config, target)
        device.release()

    return written(folder / "middle", write)


def _save(config: Any, target: Path, *, scale: float = 1) -> None:
    """Random weights in bfloat16; larger ones give logits that are far apart."""
    model: Any = tf.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model.generation_config = tf.GenerationConfig(bos_token_id=0, eos_token_id=1)  # type: ignore[no-untyped-call]
    model.to(torch.bfloat16).save_pretrained(target)


def _serve(check: Context, folder: Path, mode: str, *, measures: bool = False) -> dict[int, float]:
    """Check one mode on one model. Returns tokens per second by number of sequences."""
    name = f"{folder.name} {mode}"
    prompts = [p for p in make_prompts(check.device) if len(p) > 1]
    count = check.device.pick(16, 4)
    references = generate(check.device, folder, prompts, count)
    dtype = check.device.pick(torch.bfloat16, torch.float32)

    async def serve() -> dict[int, float]:
        async with serving(
            check.device,
            folder,
            engine="mii",
            mii={"mode": mode},
            max_batch_size=check.device.pick(max(COUNTS), 8),
        ) as served:
            answers = await served.generate_all(prompts, count)
            compare(check, name, [Output(a.tokens) for a in answers], references, dtype)
            await _check_features(check, served, name, prompts[0])
            return await _speeds(check.device, served) if measures else {}

    try:
        return asyncio.run(serve())
    except Exception as error:
        check.record.check(f"{name} serves", False, f"{type(error).__name__}: {error}"[:300])
        return {}


async def _check_features(check: Context, served: Served, name: str, prompt: list[int]) -> None:
    """What MII alone does not have: seeds, stop strings that are cut off, log-probabilities."""

    async def generate(**sampling: Any) -> list[Any]:
        return [delta async for delta in served.deltas(prompt, 24, **sampling)]

    def tokens(deltas: list[Any]) -> list[int]:
        return [token for delta in deltas for token in delta.token_ids]

    once, again = [tokens(await generate(temperature=1.0, seed=7)) for _ in range(2)]
    check.record.check(f"{name}: a seed repeats its tokens", once == again)
    text = "".join(delta.text for delta in await generate())
    stop = text[5:8]
    cut = "".join(delta.text for delta in await generate(stop=[stop]))
    check.record.check(f"{name}: a stop string", cut == text[: text.index(stop)])
    first = (await generate(logprobs=2))[0]
    count = len(first.logprobs[0].top) if first.logprobs else 0
    check.record.check(f"{name}: log-probabilities", count == 2, f"{count} of 2")


def _lengths(device: Device) -> tuple[int, int]:
    lengths: tuple[int, int] = device.pick((PROMPT, OUTPUT), (16, 4))
    return lengths


def _counts(device: Device) -> tuple[int, ...]:
    counts: tuple[int, ...] = device.pick(COUNTS, (2,))
    return counts


async def _speeds(device: Device, served: Served) -> dict[int, float]:
    prompt, output = _lengths(device)

    async def once(count: int, seed: int) -> float:
        start = time.perf_counter()
        await served.generate_all(prompts_of(count, prompt, seed), output)
        return count * output / (time.perf_counter() - start)

    rates = {}
    for count in _counts(device):
        await once(count, count)
        rates[count] = max([await once(count, 1000 + count + i) for i in range(2)])
    return rates


@in_new_process
def _pipeline_speeds(device: Device, folder: Path) -> Iterator[tuple[int, float]]:
    """MII's pipeline with MII's scheduler; it takes text, so each prompt is decoded first."""
    prompt, output = _lengths(device)
    pipeline = _stock_pipeline(device, folder)
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)

    def once(count: int, seed: int) -> float:
        texts = [tokenizer.decode(ids) for ids in prompts_of(count, prompt, seed)]
        start = time.perf_counter()
        pipeline(texts, max_new_tokens=output, do_sample=False, ignore_eos=True)
        return count * output / (time.perf_counter() - start)

    for count in _counts(device):
        once(count, count)
        yield count, max(once(count, 1000 + count + i) for i in range(2))
    pipeline.destroy()


def _stock_pipeline(device: Device, folder: Path) -> Any:
    """`MIIPipeline` as it is installed, over the engine that Triptych's ranks have.

    With a GPU, that is FastGen's own.
    """
    import mii.api
    from mii.config import ModelConfig

    from runners.engines.mii.patches.apply import ORIGINALS

    options: dict[str, Any] = {}
    if device.dry:
        memory = {"mode": "allocate", "size": 2 * max(_counts(device))}
        options["inference_engine_config"] = {"state_manager": {"memory_config": memory}}
    config = ModelConfig(model_name_or_path=str(folder), tensor_parallel=1, **options)
    stock_class: Any = ORIGINALS["MIIPipeline"][0]
    return stock_class(
        inference_engine=mii.api.load_model(config),
        tokenizer=mii.api.load_tokenizer(config),
        model_config=config,
    )
