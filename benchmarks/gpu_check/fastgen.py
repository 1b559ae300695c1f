"""Part d: MII. FastGen's kernels, the tokens of `generate`, and the speed next to MII's scheduler.

On a CPU, MII's engine is the stand-in of `runners.engines.mii`, which needs no kernels.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.models import SEED, SHAPES, written
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.recorder import Skipped
from benchmarks.gpu_check.session import Output
from benchmarks.gpu_check.serving import Served, serving
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
    for kind in check.device.pick(FAMILIES, ("llama",)):
        folder = family_model(kind, check.folder)
        # The other families differ in the model only, not in how a deployment is run.
        modes = MODES if kind == "llama" and not check.device.dry else MODES[:1]
        prompts = [p for p in make_prompts(check.device) if len(p) > 1]
        count = check.device.pick(16, 4)
        references = generate(check.device, folder, prompts, count)
        for mode in modes:
            try:
                outputs = asyncio.run(_answers(check, folder, mode, prompts, count))
            except Exception as error:
                name = f"{kind} {mode} serves"
                check.record.check(name, False, f"{type(error).__name__}: {error}"[:300])
                continue
            dtype = check.device.pick(torch.bfloat16, torch.float32)
            compare(check, f"{kind} {mode}", outputs, references, dtype)
    _measure(check)


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
        config = tf.AutoConfig.for_model(kind, **options)  # type: ignore[no-untyped-call]
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


async def _answers(
    check: Context, folder: Path, mode: str, prompts: list[list[int]], count: int
) -> list[Output]:
    async with _serving_mii(check, folder, mode) as served:
        return [Output(a.tokens) for a in await served.generate_all(prompts, count)]


def _serving_mii(check: Context, folder: Path, mode: str) -> Any:
    return serving(
        check.device,
        folder,
        engine="mii",
        mii={"mode": mode},
        max_batch_size=check.device.pick(max(COUNTS), 8),
    )


def _measure(check: Context) -> None:
    """Tokens per second of both modes and of MII's pipeline, which all run FastGen's engine."""
    folder = _middle_model(check.device, check.folder)
    speeds: dict[str, dict[int, float]] = {}
    for mode in check.device.pick(MODES, MODES[:1]):
        speeds[mode] = asyncio.run(_served_speeds(check, folder, mode))
    speeds["mii.pipeline"] = _pipeline_speeds(check, folder)
    for name, rates in speeds.items():
        check.record.figure(f"{name} tokens_per_second", rates)
    for count, rate in speeds["pipeline"].items():
        stock = speeds["mii.pipeline"][count]
        check.record.figure(f"pipeline, times mii.pipeline, {count} sequences", rate / stock)


def _counts(device: Device) -> tuple[int, ...]:
    counts: tuple[int, ...] = device.pick(COUNTS, (2,))
    return counts


async def _served_speeds(check: Context, folder: Path, mode: str) -> dict[int, float]:
    prompt, output = check.device.pick((PROMPT, OUTPUT), (16, 4))

    async def once(served: Served, count: int, seed: int) -> float:
        start = time.perf_counter()
        await served.generate_all(prompts_of(count, prompt, seed), output)
        return count * output / (time.perf_counter() - start)

    async with _serving_mii(check, folder, mode) as served:
        rates = {}
        for count in _counts(check.device):
            await once(served, count, count)
            rates[count] = max([await once(served, count, 1000 + count + i) for i in range(2)])
        return rates


def _pipeline_speeds(check: Context, folder: Path) -> dict[int, float]:
    """MII's pipeline with MII's scheduler; it takes text, so each prompt is decoded first."""
    prompt, output = check.device.pick((PROMPT, OUTPUT), (16, 4))
    pipeline = _stock_pipeline(check.device, folder)
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)

    def once(count: int, seed: int) -> float:
        texts = [tokenizer.decode(ids) for ids in prompts_of(count, prompt, seed)]
        start = time.perf_counter()
        pipeline(texts, max_new_tokens=output, do_sample=False, ignore_eos=True)
        return count * output / (time.perf_counter() - start)

    rates = {}
    for count in _counts(check.device):
        once(count, count)
        rates[count] = max(once(count, 1000 + count + i) for i in range(2))
    pipeline.destroy()
    return rates


def _stock_pipeline(device: Device, folder: Path) -> Any:
    """`MIIPipeline` as it is installed, over the engine that Triptych's ranks have."""
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
