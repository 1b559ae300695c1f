"""`python -m cli.join`: holds another machine's ranks of a model that several share.

The service runs on node 0; this runs on each of the others, with the same model and settings and a
node rank of its own, until it is told to end. Ranks that end are started again: node 0 does the
same with its own, and they meet anew at `rdzv_endpoint`. Under torchrun, which starts and watches
the processes itself, each is one rank.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from runners.config.model import BaseRunnerConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.host.group import RankGroup
from runners.protocol.environment import rank_variables
from runners.protocol.spec import spec_of

logger = logging.getLogger("triptych")

WATCH_S = 0.5


def main() -> None:
    """Run until SIGTERM or Ctrl-C, or until it is clear that this can not work."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    arguments = _arguments()
    try:
        config, program = _chosen(arguments)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _be_a_rank(config, program)
        else:
            asyncio.run(_hold(config, program, drain_s=arguments.drain))
    except ConfigError as error:
        sys.exit(f"error: {error.message}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cli.join",
        description="Holds this machine's ranks of a model that is split over several machines.",
        epilog="Each option has a variable: TRIPTYCH_TEXT_MODEL, TRIPTYCH_NODE_RANK, ...",
    )
    parser.add_argument("text_model", nargs="?", help="a folder or a tag of the model store")
    parser.add_argument("--nnodes", type=int, help="how many machines there are")
    parser.add_argument("--node-rank", type=int, help="which of them this is, from 1")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where node 0 waits")
    parser.add_argument("--tensor-parallel", type=int, help="how many ranks there are in all")
    parser.add_argument(
        "--drain",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="for how long after SIGTERM to hold the ranks while node 0 still serves (default: 0)",
    )
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> tuple[BaseRunnerConfig, str]:
    """The config of the model, and the program that loads it. Raises: ConfigError."""
    # Not above: all else here is below them.
    from model_choice import model_config
    from runners import rank_program
    from settings import get_settings

    given = {k: v for k, v in vars(arguments).items() if v is not None}
    settings = get_settings().model_copy(update=given)
    config = model_config(settings.text_model, settings)
    if config.rendezvous is None or not config.first_rank:
        raise ConfigError(
            "a node that joins needs engine deepspeed, nnodes from 2, node_rank from 1 and "
            "rdzv_endpoint; node_rank 0 is the service"
        )
    return config, rank_program(config)


async def _hold(config: BaseRunnerConfig, program: str, *, drain_s: float) -> None:
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
                break  # node 0 serves no more
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), WATCH_S)
            health = group.health()
    finally:
        await group.stop()
    if health.state is RunnerState.FAILED:
        raise ConfigError(health.detail)


def _be_a_rank(config: BaseRunnerConfig, program: str) -> None:
    spec = spec_of(config, program)
    if os.environ["LOCAL_WORLD_SIZE"] != str(spec.local_world_size):
        raise ConfigError(f"torchrun's nproc-per-node must be {spec.local_world_size}")
    rank = spec.first_rank + int(os.environ["LOCAL_RANK"])
    os.environ |= rank_variables(spec) | {"RANK": str(rank)}
    # Not above: what is set now, torch reads when it is loaded.
    from runners.rank.worker import load

    with tempfile.TemporaryDirectory(prefix=f"triptych-{os.getpid()}-") as folder:
        loaded = load(spec, rank, Path(folder), lambda _: None)
        logger.info("rank %d is ready", rank)
        while True:
            loaded.step()


if __name__ == "__main__":
    main()
