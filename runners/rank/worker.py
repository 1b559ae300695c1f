"""`python -m runners.rank.worker RUN_DIR PARENT_PID`: the loop of a rank process.

Three threads: the main thread loads the model and runs its steps; a reader passes the host's
messages to the program; a heartbeat reports once a second that the process lives and how long the
current step has taken. The end of the channel ends the process.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from runners.contracts.errors import ConfigError, first_line
from runners.contracts.runner import RunnerState
from runners.protocol.channel import RankChannel
from runners.protocol.logs import configure_logging
from runners.protocol.messages import (
    Broken,
    Fatal,
    Heartbeat,
    Hello,
    RankMessage,
    Ready,
    Shutdown,
)
from runners.protocol.process import die_with_parent, ignore_signals
from runners.protocol.spec import SOCKET, WORK, RankSpec, read_spec
from runners.rank.program import HEARTBEAT_S, LoadProgram, RankContext, RankProgram, StepClock

logger = logging.getLogger("triptych.rank")


def main() -> None:
    """Load the program that the spec names and step it until the host closes the channel."""
    run_dir = Path(sys.argv[1])
    # A rank has no chance to clean up: what libraries put there is removed with the session.
    tempfile.tempdir = str(run_dir)
    die_with_parent(int(sys.argv[2]))
    ignore_signals()
    rank = int(os.environ["RANK"])
    configure_logging(rank=rank)
    channel = RankChannel(run_dir / SOCKET)
    channel.send(Hello(rank, os.getpid()))
    try:
        program = _load(run_dir, rank, channel)
    except ConfigError as error:
        channel.send(Fatal(type(error).__name__, error.message))
        sys.exit(2)
    except Exception as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        # Where there are other ranks, the error may be the consequence of the loss of one.
        if int(os.environ["WORLD_SIZE"]) == 1 and not _may_pass(error):
            logger.exception("the model cannot be loaded")
            channel.send(Fatal(type(error).__name__, f"the model cannot be loaded: {cause}"))
            sys.exit(2)
        channel.send(_broken(rank, f"failed while it loaded the model: {cause}", error))
        raise
    clock = StepClock()
    _start_thread(_read, channel, program)
    _start_thread(_send_heartbeats, channel, program, clock, rank)
    if int(os.environ["LOCAL_RANK"]) == 0:
        channel.send(Ready(program.info))
    try:
        while True:
            with clock:
                program.step()
    except Exception as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        channel.send(_broken(rank, f"failed: {cause}", error))
        raise


def _broken(rank: int, what: str, error: Exception) -> Broken:
    """What a rank reports when it ends because of an error."""
    if _is_of_transport(error):  # its message has addresses and source files of the transport
        return Broken(rank, f"rank {rank} lost the connection to another rank", lost_another=True)
    return Broken(rank, f"rank {rank} {what}")


def _is_of_transport(error: Exception) -> bool:
    """Whether an error comes from gloo or NCCL, as when another rank is lost."""
    if (torch := sys.modules.get("torch")) is None:
        return False
    # gloo raises RuntimeErrors.
    return isinstance(error, torch.distributed.DistError) or "gloo" in first_line(error)


def _may_pass(error: Exception) -> bool:
    """Whether another start may not have this error: memory or a file that is missing."""
    passing: tuple[type[Exception], ...] = (MemoryError, OSError)
    if (torch := sys.modules.get("torch")) is not None:
        passing += (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, passing)


def _load(run_dir: Path, rank: int, channel: RankChannel) -> RankProgram:
    work_dir = run_dir / WORK
    work_dir.mkdir(mode=0o700, exist_ok=True)
    program = load(read_spec(run_dir), rank, work_dir, channel.send)
    # The loaded objects stay: no garbage collection needs to scan them while requests wait.
    gc.collect()
    gc.freeze()
    return program


def load(
    spec: RankSpec, rank: int, work_dir: Path, emit: Callable[[RankMessage], None]
) -> RankProgram:
    """The program of one rank. Raises: ConfigError."""
    context = RankContext(
        config=spec.load_config(),
        rank=rank,
        num_threads=spec.num_threads,
        work_dir=work_dir,
        emit=emit,
    )
    context.progress(RunnerState.LOADING, "importing the engine")
    module, _, function = spec.program.partition(":")
    try:
        load_program = cast(LoadProgram, getattr(importlib.import_module(module), function))
    except ModuleNotFoundError as error:
        extra = context.config.engine
        raise ConfigError(
            f"engine {extra} needs the Python package {error.name}, which is not installed: "
            f"DS_BUILD_OPS=0 pip install --no-build-isolation 'triptych[{extra}]'"
        ) from error
    return load_program(context)


def _read(channel: RankChannel, program: RankProgram) -> None:
    try:
        for message in channel:
            if isinstance(message, Shutdown):
                break
            program.receive(message)
    except BaseException:
        logger.exception("reading the host's messages failed")
        os._exit(1)
    # The main thread may be in a long step, but no rank outlives its host.
    os._exit(0)


def _send_heartbeats(
    channel: RankChannel, program: RankProgram, clock: StepClock, rank: int
) -> None:
    try:
        while True:
            load = program.occupancy()
            channel.send(
                Heartbeat(
                    rank,
                    clock.age,
                    load.running,
                    load.waiting,
                    load.kv_tokens_used,
                    load.kv_tokens_total,
                )
            )
            time.sleep(HEARTBEAT_S)
    except OSError:
        os._exit(0)


def _start_thread(target: Callable[..., None], *args: object) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


if __name__ == "__main__":
    main()
