"""Part c: the throughput of a Llama with 8 billion random parameters in bfloat16.

Compared with what the card can do, measured in the same run, and with transformers' continuous
batching of the same model on the same prompts.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.models import large_model
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.rates import Cost, Limits, Round, summary
from benchmarks.gpu_check.session import Prompts, Session
from tests.support.models import VOCAB, write_tokenizer

COUNTS = (1, 8, 64, 256)
COMPARED = (1, 8, 64)
"""Numbers of sequences with which transformers must not be faster."""
BANDWIDTH_BAR = 0.80
PROMPT, OUTPUT, LONG_PROMPT = 128, 128, 4096
ROUNDS = 3
Generate = Callable[[Prompts, int], Round]


def run(check: Context) -> None:
    """Limits, then Triptych, then transformers."""
    device = check.device
    limits = Limits(device.copy_bandwidth(), device.matmul_rate())
    check.record.figure("copy_gb_per_second", limits.bytes_per_second / 1e9)
    check.record.figure("matmul_tflops", limits.operations_per_second / 1e12)
    speeds = _triptych(check, limits)
    device.release()
    peer = _transformers(check)
    for count, speed in speeds.items():
        name = f"{count} sequences, times transformers' continuous batching"
        ratio = speed / peer.get(count, float("nan"))
        if count in COMPARED:
            check.record.bar(name, ratio, minimum=1.0)
        else:
            check.record.figure(name, ratio)
    rates = ", ".join(f"{speed:.0f} with {count}" for count, speed in speeds.items())
    check.record.headline(f"tokens per second: {rates} sequences")


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of which no two share a prefix."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (count, length), generator=random).tolist()


def _triptych(check: Context, limits: Limits) -> dict[int, float]:
    """Measure Triptych. Returns tokens per second by number of sequences."""
    device = check.device
    prompt, output = device.pick((PROMPT, OUTPUT), (16, 8))
    long = device.pick(LONG_PROMPT, 64)
    model = large_model(device)
    cost = Cost.of(model)
    folder = check.folder / "large-in-memory"  # has the tokenizer only
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    largest = max(device.pick(COUNTS, (1, 2)))
    start = time.perf_counter()
    session = Session(
        device,
        folder,
        model=model,
        max_batch_size=largest,
        max_step_tokens=device.pick(2048, 64),
        max_kv_tokens=largest * (prompt + output + 32) + long + 32,
    )
    check.record.figure("prepared_s", time.perf_counter() - start)

    def generate(prompts: Prompts, count: int) -> Round:
        start = time.perf_counter()
        outputs = session.generate(prompts, count)
        if errors := [o.error for o in outputs if o.error is not None]:
            raise RuntimeError(errors[0])
        return Round(start, [o.times for o in outputs])

    speeds = {}
    for count in device.pick(COUNTS, (1, 2)):
        entry = summary(_rounds(device, generate, count))
        rate = entry["decode_tokens_per_second"]
        context = prompt + output / 2
        entry["bandwidth_share"] = cost.bandwidth_share(rate, count, context, limits)
        entry["operations_share"] = cost.operations_share(rate, limits)
        check.record.figure(f"triptych {count}", entry)
        speeds[count] = entry["tokens_per_second"]
        if count == 1:
            check.record.bar(
                "1 sequence, share of the bandwidth",
                entry["bandwidth_share"],
                minimum=BANDWIDTH_BAR,
            )
    rates = [long / generate(prompts_of(1, long, seed), 1).first_token for seed in (91, 92, 93)]
    check.record.figure("prefill_tokens_per_second", rates[1:])
    check.record.figure("prefill_operations_share", cost.operations_share(max(rates), limits))
    return speeds


def _rounds(device: Device, generate: Generate, count: int) -> list[Round]:
    """A round to warm up, and those that count; every prompt is new."""
    prompt, output = device.pick((PROMPT, OUTPUT), (16, 8))
    rounds = [
        generate(prompts_of(count, prompt, 1000 * number + count), output)
        for number in range(device.pick(ROUNDS, 1) + 1)
    ]
    return rounds[1:]


def _transformers(check: Context) -> dict[int, float]:
    """Measure transformers, in its fastest mode, or else in its default one."""
    device = check.device
    fast = {"use_cuda_graph": True, "use_async_batching": True}
    small = {"num_blocks": 16, "max_batch_tokens": 64}
    speeds = {}
    for options in device.pick((fast, {}), (small,)):
        try:
            with _continuous_batching(check, options) as generate:
                for count in device.pick(COUNTS, (1, 2)):
                    entry = summary(_rounds(device, generate, count))
                    check.record.figure(f"transformers {count}", entry)
                    speeds[count] = entry["tokens_per_second"]
            return speeds
        except Exception as error:
            traceback.print_exc()
            check.record.skip(f"transformers with {options}", f"{type(error).__name__}: {error}")
            device.release()
    return speeds


@contextmanager
def _continuous_batching(check: Context, options: dict[str, Any]) -> Iterator[Generate]:
    """transformers' continuous batching with options of its config."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    device = check.device
    model = large_model(device)
    output = device.pick(OUTPUT, 8)
    # No end token; -1 stands for that.
    generation = GenerationConfig(do_sample=False, max_new_tokens=output, eos_token_id=-1)  # type: ignore[no-untyped-call]
    values = {"max_requests_per_batch": max(COUNTS)} | options
    config = ContinuousBatchingConfig(**_fields(ContinuousBatchingConfig, values))
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config
    ) as manager:
        used = manager.continuous_batching_config
        chosen = {"attention": model.config._attn_implementation}
        for name in ("use_cuda_graph", "use_async_batching"):
            chosen[name] = str(getattr(used, name, None))
        check.record.figure("transformers_options", chosen)

        def generate(prompts: Prompts, count: int) -> Round:
            start = time.perf_counter()
            names = manager.add_requests(
                inputs=[list(p) for p in prompts], max_new_tokens=count, record_timestamps=True
            )
            results: dict[str, Any] = {}
            while len(results) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended")
                if result is not None and result.is_finished():
                    results[result.request_id] = result
            if errors := [r.error for r in results.values() if r.error is not None]:
                raise RuntimeError(f"transformers' continuous batching: {errors[0]}")
            return Round(start, [results[name].timestamps for name in names])

        yield generate


def _fields(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that this version of transformers has."""
    return {key: value for key, value in options.items() if key in cls.__dataclass_fields__}  # type: ignore[attr-defined]
