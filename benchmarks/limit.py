"""The limit: throughput of the model on this machine if only `model.forward` takes time.

Measured in a loop over transformers' forward, with all rows of a batch equally long and no
scheduling, sampling, detokenization or HTTP. With `t_prefill` seconds per prompt token (in batches
of 512 tokens) and `t_decode(c)` seconds per step of c sequences at the workload's mean context, the
throughput with c clients is at most

    tokens / (prompt_tokens * t_prefill + tokens / c * t_decode(c))

tokens per second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.isolated import arguments, run_isolated
from benchmarks.model import model_folder
from benchmarks.workload import OUTPUT_TOKENS, PROMPT_TOKENS

PREFILL_BATCH = (4, 128)
MEAN_CONTEXT = sum(PROMPT_TOKENS) // 2 + sum(OUTPUT_TOKENS) // 4
"""Tokens of a mean prompt and half of its mean output."""
CacheFactory = Callable[[], Any]


def measure(threads: int, concurrencies: Sequence[int], *, steps: int = 24) -> dict[str, Any]:
    """`t_prefill` in seconds per token; `t_decode` in seconds per step, by concurrency."""
    model = str(model_folder())
    times: dict[str, Any] = run_isolated(
        __name__, threads, model=model, concurrencies=list(concurrencies), steps=steps
    )
    return times


def tokens_per_second(
    limit: Mapping[str, Any], concurrency: int, prompt_tokens: float, tokens: float
) -> float:
    """The limit by the formula of this module."""
    steps = tokens / concurrency * limit["t_decode"][str(concurrency)]
    return float(tokens / (prompt_tokens * limit["t_prefill"] + steps))


def main() -> None:
    """Measure, in the new process, and print the times as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    args = arguments()
    torch.set_num_threads(args["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(args["model"], attn_implementation="sdpa")
    with torch.inference_mode():
        times = {
            "threads": args["threads"],
            "mean_context": MEAN_CONTEXT,
            "t_prefill": _prefill(model),
            "t_decode": {c: _decode(model, c, args["steps"]) for c in args["concurrencies"]},
        }
    print(json.dumps(times))


def _prefill(model: Any) -> float:
    """Seconds per prompt token."""
    rows, width = PREFILL_BATCH
    ids = _tokens(model, rows, width)
    times = [_seconds(lambda: model(ids, logits_to_keep=1)) for _ in range(6)]
    return median(times[1:]) / (rows * width)


def _decode(model: Any, rows: int, steps: int) -> float:
    """Seconds per step of `rows` sequences, with the faster of transformers' two KV caches."""
    from transformers import DynamicCache, StaticCache

    max_length = MEAN_CONTEXT + steps

    def static_cache() -> Any:
        return StaticCache(config=model.config, max_cache_len=max_length)

    return min(_steps(model, rows, steps, make) for make in (DynamicCache, static_cache))


def _steps(model: Any, rows: int, steps: int, make_cache: CacheFactory) -> float:
    cache = make_cache()
    # The context grows by a token per step, so that its mean over the steps is MEAN_CONTEXT.
    for start in range(0, MEAN_CONTEXT - steps // 2, 64):
        width = min(64, MEAN_CONTEXT - steps // 2 - start)
        model(_tokens(model, rows, width), past_key_values=cache, logits_to_keep=1)
    next_token = _tokens(model, rows, 1)
    times = [
        _seconds(lambda: model(next_token, past_key_values=cache).logits.argmax(-1))
        for _ in range(steps)
    ]
    return median(times[2:])


def _tokens(model: Any, rows: int, width: int) -> Any:
    import torch

    return torch.randint(300, model.config.vocab_size, (rows, width), device=model.device)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
