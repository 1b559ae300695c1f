"""Mode `pipeline` of our MII engine against stock `MIIPipeline`, over the same engine, in one run.

`MIIPipeline` takes a batch of prompts and returns when all are answered, so that is what both get:
batches of as many equal requests as there are clients. On a CPU both run on the stand-in engine;
on a GPU on FastGen's.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.fresh import arguments, fresh, say
from benchmarks.model import model_folder, words

SIDES = ("ours", "stock")
PROMPT_TOKENS, OUTPUT_TOKENS, BATCHES = 128, 64, 3
BLOCKS_PER_REQUEST = 2
"""Of 128 tokens, which hold a request."""


def measure(
    threads: int, concurrencies: Sequence[int], rounds: int, *, batches: int = BATCHES
) -> list[dict[str, Any]]:
    """One entry per concurrency and round: tokens a second of both. Raises: Unavailable."""
    entries = []
    for number in range(1, rounds + 1):
        for clients in concurrencies:
            speeds = {
                side: fresh(__name__, threads, side=side, concurrency=clients, batches=batches)
                for side in SIDES
            }
            entries.append({"round": number, "concurrency": clients, **speeds})
            ratio = speeds["ours"] / speeds["stock"]
            print(f"mii {clients:4}: {speeds} tok/s, ratio {ratio:.2f}")
    return entries


def batches(clients: int, count: int) -> list[list[workload.Request]]:
    """One to warm up with, then `count`; no prompt comes twice."""
    rng = random.Random(workload.SEED)  # noqa: S311 - a workload is no secret
    every = words(model_folder())
    return [
        [workload.sized(rng, every, PROMPT_TOKENS, OUTPUT_TOKENS) for _ in range(clients)]
        for _ in range(count + 1)
    ]


def _ours(clients: int, threads: int, work_dir: Path) -> Callable[[list[workload.Request]], None]:
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

    import runners.engines.mii.patches.apply as patches

    memory = {"mode": "allocate", "size": BLOCKS_PER_REQUEST * clients}
    config = ModelConfig(
        model_name_or_path=str(model_folder()),
        tensor_parallel=1,
        inference_engine_config={"state_manager": {"memory_config": memory}},
    )
    stock: Any = patches.ORIGINALS["MIIPipeline"][0]
    pipeline = stock(
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
    """In the fresh process: tokens a second of one side."""
    given = arguments()
    clients = given["concurrency"]
    make = _ours if given["side"] == "ours" else _stock
    with tempfile.TemporaryDirectory() as work_dir:
        run = make(clients, given["threads"], Path(work_dir))
        warm_up, *measured = batches(clients, given["batches"])
        run(warm_up)
        began = time.monotonic()
        for batch in measured:
            run(batch)
        took = time.monotonic() - began
    say(len(measured) * clients * OUTPUT_TOKENS / took)


if __name__ == "__main__":
    main()
