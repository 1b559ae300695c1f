"""`python -m cli.join`: runs the ranks of one node of a model that is split over several machines.

The service runs on node 0; this command runs on each of the other nodes, with the same model and
settings and another node rank, until it is stopped. Ranks that end are started again: node 0 does
the same, and all meet again at `rdzv_endpoint`. Under torchrun, which starts and supervises the
processes, each process is one rank.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys

from model_choice import model_config
from runners import rank_program
from runners.config.base import BaseRunnerConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.host.group import RankGroup
from runners.protocol.environment import rank_variables
from runners.protocol.folders import process_folder
from runners.protocol.logs import configure_logging
from runners.protocol.spec import make_spec
from settings import get_settings

logger = logging.getLogger("triptych.join")

WATCH_S = 0.5


def main() -> None:
    """Run until SIGTERM or Ctrl-C, or until the ranks have failed for good."""
    arguments = _arguments()
    try:
        config, program = _choose(arguments)
        configure_logging()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _run_as_rank(config, program)
        else:
            asyncio.run(_supervise(config, program, drain_s=arguments.drain))
    except ConfigError as error:
        sys.exit(f"error: {error.message}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cli.join",
        description="Runs this machine's ranks of a model that is split over several machines.",
        epilog="Each option has a variable: TRIPTYCH_TEXT_MODEL, TRIPTYCH_NODE_RANK, ...",
    )
    parser.add_argument("text_model", nargs="?", help="a folder or a tag of the model store")
    parser.add_argument("--nnodes", type=int, help="number of machines")
    parser.add_argument("--node-rank", type=int, help="index of this machine, from 1")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="address of node 0")
    parser.add_argument("--tensor-parallel", type=int, help="number of ranks on all machines")
    parser.add_argument(
        "--drain",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long the ranks run on after SIGTERM while node 0 still serves (default: 0)",
    )
    return parser.parse_args()


def _choose(arguments: argparse.Namespace) -> tuple[BaseRunnerConfig, str]:
    """The config of the model, and the program that loads it. Raises: ConfigError."""
    changes = {k: v for k, v in vars(arguments).items() if v is not None}
    settings = get_settings().model_copy(update=changes)
    config = model_config(settings.text_model, settings)
    if config.rendezvous is None or not config.first_rank:
        raise ConfigError(
            "a node that joins needs engine deepspeed, nnodes from 2, node_rank from 1 and "
            "rdzv_endpoint; node_rank 0 is the service"
        )
    return config, rank_program(config)


async def _supervise(config: BaseRunnerConfig, program: str, *, drain_s: float) -> None:
    loop, stop, draining = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def drain() -> None:
        draining.set()
        loop.call_later(drain_s, stop.set)

    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, drain)
    group = RankGroup(
        config,
        program=program,
        on_message=lambda _: None,
        on_down=lambda _: None,
    )
    await group.start()
    try:
        health = group.health()
        while not stop.is_set() and health.state is not RunnerState.FAILED:
            if draining.is_set() and health.state is not RunnerState.READY:
                break  # node 0 has stopped serving
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), WATCH_S)
            health = group.health()
    finally:
        await group.stop()
    if health.state is RunnerState.FAILED:
        raise ConfigError(health.detail)


def _run_as_rank(config: BaseRunnerConfig, program: str) -> None:
    spec = make_spec(config, program)
    if os.environ["LOCAL_WORLD_SIZE"] != str(config.local_world_size):
        raise ConfigError(f"torchrun's nproc-per-node must be {config.local_world_size}")
    rank = config.first_rank + int(os.environ["LOCAL_RANK"])
    os.environ |= rank_variables(config, spec.num_threads) | {"RANK": str(rank)}
    configure_logging(rank=rank)
    # Not at the top: this imports torch, which reads these variables when it is imported.
    from runners.rank.worker import load

    loaded = load(spec, rank, process_folder(), lambda _: None)
    logger.info("rank %d is ready", rank)
    while True:
        loaded.step()


if __name__ == "__main__":
    main()
