"""The limit: how fast this machine runs the model when nothing but `model.forward` is in the way.

A loop over transformers' own forward, with all rows of a batch equally long and nothing to
schedule, sample, decode or send. With `t_prefill` seconds per prompt token (in batches of about 512
tokens) and `t_decode(c)` seconds per step of c sequences at the workload's mean context, a server
with c clients can at most give

    tokens / (prompt_tokens * t_prefill + tokens / c * t_decode(c))

tokens a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.fresh import arguments, fresh
from benchmarks.model import model_folder
from benchmarks.workload import OUTPUT_TOKENS, PROMPT_TOKENS

PREFILL_BATCH = (4, 128)
MEAN_CONTEXT = sum(PROMPT_TOKENS) // 2 + sum(OUTPUT_TOKENS) // 4
"""A prompt and half its answer."""
Make = Callable[[], Any]


def measure(threads: int, concurrencies: Sequence[int], *, steps: int = 24) -> dict[str, Any]:
    """`t_prefill` in seconds per token; `t_decode` in seconds per step, by concurrency."""
    model = str(model_folder())
    found: dict[str, Any] = fresh(
        __name__, threads, model=model, concurrencies=list(concurrencies), steps=steps
    )
    return found


def tokens_per_second(
    limit: Mapping[str, Any], concurrency: int, prompt_tokens: float, tokens: float
) -> float:
    """The formula above."""
    steps = tokens / concurrency * limit["t_decode"][str(concurrency)]
    return float(tokens / (prompt_tokens * limit["t_prefill"] + steps))


def main() -> None:
    """In the fresh process."""
    import torch
    from transformers import AutoModelForCausalLM

    given = arguments()
    torch.set_num_threads(given["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(given["model"], attn_implementation="sdpa")
    with torch.inference_mode():
        answer = {
            "threads": given["threads"],
            "mean_context": MEAN_CONTEXT,
            "t_prefill": _prefill(model),
            "t_decode": {c: _decode(model, c, given["steps"]) for c in given["concurrencies"]},
        }
    print(json.dumps(answer))


def _prefill(model: Any) -> float:
    """Seconds per prompt token."""
    rows, width = PREFILL_BATCH
    ids = _tokens(model, rows, width)
    times = [_seconds(lambda: model(ids, logits_to_keep=1)) for _ in range(6)]
    return median(times[1:]) / (rows * width)


def _decode(model: Any, rows: int, steps: int) -> float:
    """Seconds per step of `rows` sequences, with whichever of transformers' caches is faster."""
    from transformers import DynamicCache, StaticCache

    room = MEAN_CONTEXT + steps

    def static() -> Any:
        return StaticCache(config=model.config, max_cache_len=room)

    return min(_steps(model, rows, steps, make) for make in (DynamicCache, static))


def _steps(model: Any, rows: int, steps: int, make: Make) -> float:
    cache = make()
    # The context need not be the mean exactly, but its mean over the steps is.
    for start in range(0, MEAN_CONTEXT - steps // 2, 64):
        width = min(64, MEAN_CONTEXT - steps // 2 - start)
        model(_tokens(model, rows, width), past_key_values=cache, logits_to_keep=1)
    one = _tokens(model, rows, 1)
    times = [
        _seconds(lambda: model(one, past_key_values=cache).logits.argmax(-1)) for _ in range(steps)
    ]
    return median(times[2:])


def _tokens(model: Any, rows: int, width: int) -> Any:
    import torch

    return torch.randint(300, model.config.vocab_size, (rows, width), device=model.device)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
