"""Part c: the throughput of a Llama with 8 billion random parameters in bfloat16.

Compared with what the card can do, measured in the same run, and with transformers' continuous
batching of the same model on the same prompts.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.models import large_model
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.peers import in_new_process
from benchmarks.gpu_check.rates import Cost, Limits, Round, summary
from benchmarks.gpu_check.session import Prompts, Session
from tests.support.models import VOCAB, write_tokenizer

COUNTS = (1, 8, 64, 256)
COMPARED = (1, 8, 64)
"""Numbers of sequences with which transformers must not be faster."""
BANDWIDTH_BAR = 0.80
PROMPT, OUTPUT, LONG_PROMPT = 128, 128, 4096
ROUNDS = 3
MARGIN = 1.5
"""Time for a measurement that has to be left in a part, relative to one that took place."""
Generate = Callable[[Prompts, int], Round]


def run(check: Context) -> None:
    """Limits, then Triptych, then transformers, then Triptych with torch's operators."""
    device = check.device
    limits = Limits(device.copy_bandwidth(), device.matmul_rate())
    device.release()
    check.record.figure("copy_gb_per_second", limits.bytes_per_second / 1e9)
    check.record.figure("matmul_tflops", limits.operations_per_second / 1e12)
    folder = check.folder / "large-in-memory"  # has the tokenizer only
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    counts = device.pick(COUNTS, (1, 2))
    start = time.monotonic()
    speeds = dict(_record(check, "triptych", _triptych(device, folder, limits, counts)))
    spent_s = time.monotonic() - start
    figures = check.record.result["figures"]
    share = figures["triptych 1"]["bandwidth_share"]
    check.record.bar("1 sequence, share of the bandwidth", share, minimum=BANDWIDTH_BAR)
    rates = ", ".join(f"{speed:.0f} with {count}" for count, speed in speeds.items())
    setting = figures["triptych setting"]
    check.record.headline(f"tokens per second: {rates} sequences; {setting}")
    peer = _transformers(check, counts)
    for count, speed in speeds.items():
        name = f"{count} sequences, times transformers' continuous batching"
        ratio = speed / peer.get(count, float("nan"))
        if count in COMPARED:
            check.record.bar(name, ratio, minimum=1.0)
        else:
            check.record.figure(name, ratio)
    _cost_of_invariance(check, folder, limits, speeds, spent_s)


def _record(
    check: Context, side: str, figures: Iterator[tuple[int | str, Any]]
) -> Iterator[tuple[int, float]]:
    """Record figures as they come. Yields numbers of sequences and their tokens per second."""
    for key, value in figures:
        check.record.figure(f"{side} {key}", value)
        if isinstance(key, int):
            yield key, value["tokens_per_second"]


def _cost_of_invariance(
    check: Context, folder: Path, limits: Limits, speeds: dict[int, float], spent_s: float
) -> None:
    """Measure Triptych with torch's operators, where a row's bits depend on the batch.

    `speeds` are those with Triptych's, and took `spent_s` to measure.
    """
    name = "triptych, batch_invariant false"
    left_s = check.ends - time.monotonic()
    if left_s < MARGIN * spent_s:
        check.record.skip(name, f"{left_s:.0f} s are left of this part")
        return
    counts = check.device.pick(COMPARED, (1, 2))
    figures = _triptych(check.device, folder, limits, counts, batch_invariant=False)
    try:
        others = dict(_record(check, name, figures))
    except Exception as error:  # what was measured before is complete
        traceback.print_exc()
        check.record.check(name, False, f"{type(error).__name__}: {error}"[:300])
        return
    ratios = {count: speeds[count] / other for count, other in others.items()}
    check.record.figure("batch_invariant true, times false", ratios)
    text = ", ".join(f"{ratio:.2f} with {count}" for count, ratio in ratios.items())
    check.record.headline(f"batch_invariant true, times false: {text} sequences")


def prompts_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of which no two share a prefix."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (count, length), generator=random).tolist()


@in_new_process
def _triptych(
    device: Device,
    folder: Path,
    limits: Limits,
    counts: Sequence[int],
    *,
    batch_invariant: bool = True,
) -> Iterator[tuple[int | str, Any]]:
    """Figures of Triptych: with each number of sequences, and others by name."""
    prompt, output = device.pick((PROMPT, OUTPUT), (16, 8))
    long = device.pick(LONG_PROMPT, 64)
    model = large_model(device)
    cost = Cost.of(model)
    largest = max(counts)
    start = time.perf_counter()
    session = Session(
        device,
        folder,
        model=model,
        max_batch_size=largest,
        max_step_tokens=device.pick(2048, 64),
        max_kv_tokens=largest * (prompt + output + 32) + long + 32,
        batch_invariant=batch_invariant,
    )
    yield "prepared_s", time.perf_counter() - start
    yield "setting", session.invariance

    def generate(prompts: Prompts, count: int) -> Round:
        start = time.perf_counter()
        outputs = session.generate(prompts, count)
        if errors := [o.error for o in outputs if o.error is not None]:
            raise RuntimeError(errors[0])
        return Round(start, [o.times for o in outputs])

    for count in counts:
        entry = summary(_rounds(device, generate, count))
        rate = entry["decode_tokens_per_second"]
        context = prompt + output / 2
        entry["bandwidth_share"] = cost.bandwidth_share(rate, count, context, limits)
        entry["operations_share"] = cost.operations_share(rate, limits)
        yield count, entry
    rates = [long / generate(prompts_of(1, long, seed), 1).first_token for seed in (91, 92, 93)]
    yield "prefill_tokens_per_second", rates[1:]
    yield "prefill_operations_share", cost.operations_share(max(rates), limits)


def _rounds(device: Device, generate: Generate, count: int) -> list[Round]:
    """A round to warm up, and those that count; every prompt is new."""
    prompt, output = device.pick((PROMPT, OUTPUT), (16, 8))
    rounds = [
        generate(prompts_of(count, prompt, 1000 * number + count), output)
        for number in range(device.pick(ROUNDS, 1) + 1)
    ]
    return rounds[1:]


def _transformers(check: Context, counts: Sequence[int]) -> dict[int, float]:
    """Tokens per second of transformers, in its fastest mode, or where that fails in its default
    one.

    Raises: RuntimeError as `Device.require_stock`.
    """
    check.device.require_stock()
    fast = {"use_cuda_graph": True, "use_async_batching": True}
    small = {"num_blocks": 16, "max_batch_tokens": 64}
    speeds: dict[int, float] = {}
    for options in check.device.pick((fast, {}), (small,)):
        if not (left := [count for count in counts if count not in speeds]):
            break
        figures = _continuous_batching(check.device, options, left)
        try:
            for count, speed in _record(check, "transformers", figures):
                speeds[count] = speed
        except Exception as error:
            traceback.print_exc()
            check.record.skip(f"transformers with {options}", f"{type(error).__name__}: {error}")
            check.device.release()
    return speeds


@in_new_process
def _continuous_batching(
    device: Device, options: dict[str, Any], counts: Sequence[int]
) -> Iterator[tuple[int | str, Any]]:
    """Figures of transformers' continuous batching with options of its config, as `_triptych`."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

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

        for count in counts:
            yield count, summary(_rounds(device, generate, count)) | chosen


def _fields(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that this version of transformers has."""
    return {key: value for key, value in options.items() if key in cls.__dataclass_fields__}  # type: ignore[attr-defined]
