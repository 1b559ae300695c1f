"""`python -m benchmarks.gpu_mii`: MII on one NVIDIA GPU. NOT YET RUN, for lack of a GPU.

Builds FastGen's kernels and loads a Llama of a billion random parameters in bfloat16, or the model
of `--model`. For Triptych's modes `pipeline` and `persistent` it compares the greedy tokens with
`generate`'s and prints tokens per second, time to first token and the share of the memory
bandwidth; for `mii.pipeline` it prints tokens per second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import limit, measure_bandwidth
from benchmarks.mii_pipeline import OUTPUT_TOKENS, batches
from benchmarks.model import large_model_folder

CONCURRENCIES = (1, 16, 64)
CHECKED = 4
MODES = ("pipeline", "persistent")


def reference(folder: Path, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of `generate(do_sample=False)` on the GPU, for each prompt."""
    import torch
    import transformers as tf

    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.to("cuda")
    outputs = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to("cuda")
        sequence = model.generate(**inputs, do_sample=False, max_new_tokens=OUTPUT_TOKENS)
        outputs.append(sequence[0, inputs.input_ids.shape[1] :].tolist())
    del model
    torch.cuda.empty_cache()
    return outputs


async def serve(folder: Path, mode: str, bandwidth: float) -> None:
    """Check the greedy tokens of one of Triptych's MII modes, then measure its speed."""
    from runners import create_runner
    from runners.config.model import validate
    from runners.contracts.text import GenerationRequest, SamplingParams

    config = validate(
        {
            "engine": "mii",
            "name": "bench",
            "model_path": folder,
            "mii": {"mode": mode},
            "max_batch_size": max(CONCURRENCIES),
            "start_timeout": 3600,
        }
    )
    runner = create_runner(config)
    await runner.start()
    start = time.monotonic()
    while not runner.health().ready:
        if (health := runner.health()).state == "failed":
            raise SystemExit(f"{mode}: {health.detail}")
        await asyncio.sleep(0.2)
    print(f"{mode}: ready after {time.monotonic() - start:.0f} s")

    async def generate(prompt: str, name: str) -> tuple[list[int], float]:
        sampling = SamplingParams(max_new_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        sent, first, tokens = time.monotonic(), 0.0, []
        request = GenerationRequest(request_id=name, prompt=prompt, sampling=sampling)
        async with await runner.generate(request) as stream:
            async for delta in stream:
                first = first or time.monotonic() - sent
                tokens += delta.token_ids
        return tokens, first

    try:
        prompts = [request.prompt for request in batches(CHECKED, 0)[0]]
        outputs = [(await generate(p, f"check-{i}"))[0] for i, p in enumerate(prompts)]
        expected = reference(folder, prompts)
        equal = sum(a == b for a, b in zip(outputs, expected, strict=True))
        print(f"{mode}: {equal} of {CHECKED} greedy answers equal generate's")
        weights = (folder / "model.safetensors").stat().st_size
        for clients in CONCURRENCIES:
            _, measured = batches(clients, 1)
            start = time.monotonic()
            answers = await asyncio.gather(
                *(generate(r.prompt, f"{clients}-{i}") for i, r in enumerate(measured))
            )
            speed = clients * OUTPUT_TOKENS / (time.monotonic() - start)
            first = statistics.median(answer[1] for answer in answers)
            share = speed / limit(clients, weights, bandwidth)
            print(
                f"{mode} {clients:4}: {speed:8.1f} tok/s, TTFT {first * 1000:.0f} ms, "
                f"{share:.0%} of the bandwidth"
            )
    finally:
        await runner.stop()


def stock(folder: Path) -> None:
    """`mii.pipeline`, with MII's own scheduler."""
    import mii

    import runners.engines.mii.patches

    assert runners.engines.mii.patches  # noqa: S101 - the import patches MII
    pipeline = mii.pipeline(str(folder))
    for clients in CONCURRENCIES:
        warm_up, measured = batches(clients, 1)
        options = {"do_sample": False, "ignore_eos": True, "max_new_tokens": OUTPUT_TOKENS}
        pipeline([request.prompt for request in warm_up], **options)
        start = time.monotonic()
        pipeline([request.prompt for request in measured], **options)
        speed = clients * OUTPUT_TOKENS / (time.monotonic() - start)
        print(f"mii.pipeline {clients:4}: {speed:8.1f} tok/s")
    pipeline.destroy()


def main() -> None:
    """Run every mode."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_mii", description=__doc__)
    parser.add_argument("--model", type=Path, help="model folder; default: the random Llama")
    args = parser.parse_args()
    folder = args.model or large_model_folder()
    gpu = measure_bandwidth()
    print(f"{gpu['name']}, {gpu['bytes_per_second'] / 1e9:.0f} GB/s")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MII_CACHE_PATH"] = cache
        for mode in MODES:
            asyncio.run(serve(folder, mode, gpu["bytes_per_second"]))
        stock(folder)


if __name__ == "__main__":
    main()
