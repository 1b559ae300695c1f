"""Mode `pipeline` of Triptych's MII engine against stock `MIIPipeline`, on the same engine.

`MIIPipeline` takes a batch of prompts and returns when all are complete. Both therefore get batches
of equally sized requests, one for each client. On a CPU both use the stand-in engine, on a GPU
FastGen's.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.isolated import arguments, exit_with, run_isolated
from benchmarks.model import model_folder, words

SIDES = ("ours", "stock")
"""Triptych and MII, by their keys in results.json."""
PROMPT_TOKENS, OUTPUT_TOKENS, BATCHES = 128, 64, 3
BLOCKS_PER_REQUEST = 2
"""KV blocks of 128 tokens that one request needs."""


def measure(
    threads: int, concurrencies: Sequence[int], rounds: int, *, batches: int = BATCHES
) -> list[dict[str, Any]]:
    """One entry per concurrency and round: tokens per second of both. Raises: Unavailable."""
    entries = []
    for number in range(1, rounds + 1):
        for clients in concurrencies:
            speeds = {
                side: run_isolated(
                    __name__, threads, side=side, concurrency=clients, batches=batches
                )
                for side in SIDES
            }
            entries.append({"round": number, "concurrency": clients, **speeds})
            ratio = speeds["ours"] / speeds["stock"]
            print(f"mii {clients:4}: {speeds} tok/s, ratio {ratio:.2f}")
    return entries


def batches(clients: int, count: int) -> list[list[workload.Request]]:
    """A batch to warm up with, then `count` batches; no prompt is repeated."""
    rng = random.Random(workload.SEED)  # noqa: S311 - not cryptographic
    all_words = words(model_folder())
    return [
        [workload.sized(rng, all_words, PROMPT_TOKENS, OUTPUT_TOKENS) for _ in range(clients)]
        for _ in range(count + 1)
    ]


def _triptych(
    clients: int, threads: int, work_dir: Path
) -> Callable[[list[workload.Request]], None]:
    from benchmarks.overhead import InProcess

    program = InProcess(clients, threads, work_dir, engine="mii")

    def run(batch: list[workload.Request]) -> None:
        program.run(batch, clients)

    return run


def _stock(clients: int, threads: int, work_dir: Path) -> Callable[[list[workload.Request]], None]:
    import torch

    torch.set_num_threads(threads)
    import mii.api
    from mii.config import ModelConfig

    from runners.engines.mii.patches.apply import ORIGINALS

    memory = {"mode": "allocate", "size": BLOCKS_PER_REQUEST * clients}
    config = ModelConfig(
        model_name_or_path=str(model_folder()),
        tensor_parallel=1,
        inference_engine_config={"state_manager": {"memory_config": memory}},
    )
    stock_class: Any = ORIGINALS["MIIPipeline"][0]
    pipeline = stock_class(
        inference_engine=mii.api.load_model(config),
        tokenizer=mii.api.load_tokenizer(config),
        model_config=config,
    )

    def run(batch: list[workload.Request]) -> None:
        pipeline(
            [request.prompt for request in batch],
            max_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
            ignore_eos=True,
        )

    return run


def main() -> None:
    """Measure the tokens per second of one side, in the new process."""
    args = arguments()
    clients = args["concurrency"]
    make = _triptych if args["side"] == "ours" else _stock
    with tempfile.TemporaryDirectory() as work_dir:
        run = make(clients, args["threads"], Path(work_dir))
        warm_up, *measured = batches(clients, args["batches"])
        run(warm_up)
        start = time.monotonic()
        for batch in measured:
            run(batch)
        elapsed = time.monotonic() - start
    exit_with(len(measured) * clients * OUTPUT_TOKENS / elapsed)


if __name__ == "__main__":
    main()
