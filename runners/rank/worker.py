"""`python -m runners.rank.worker RUN_DIR PARENT_PID`: the loop in a rank.

Three threads: this one loads the model and runs its steps; a reader hands the host's messages to
the program; a heartbeat tells the host once a second that the process lives and how long the
current step has taken. The end of the channel ends the process.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import cast

from runners.config.model import runner_config_adapter
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.protocol.channel import RankChannel
from runners.protocol.messages import (
    Broken,
    Fatal,
    Heartbeat,
    Hello,
    ImageReady,
    RankMessage,
    Ready,
    Shutdown,
)
from runners.protocol.process import die_with_parent, outlive_signals
from runners.protocol.spec import SOCKET, WORK, RankSpec, read_spec
from runners.rank.program import LoadProgram, RankContext, RankProgram

HEARTBEAT_S = 1.0


class _StepClock:
    """When the current step began; read by the heartbeat thread."""

    def __init__(self) -> None:
        self._began: float | None = None

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._began = None

    @property
    def age(self) -> float:
        began = self._began
        return 0.0 if began is None else time.monotonic() - began


def main() -> None:
    """Load the program named in the spec and step it until the host lets go."""
    run_dir = Path(sys.argv[1])
    die_with_parent(int(sys.argv[2]))
    outlive_signals()
    rank = int(os.environ["RANK"])
    channel = RankChannel(run_dir / SOCKET)
    channel.send(Hello(rank, os.getpid()))
    try:
        program = _load(run_dir, rank, channel)
    except ConfigError as error:
        channel.send(Fatal(type(error).__name__, error.message))
        sys.exit(2)
    clock = _StepClock()
    _start_thread(_read, channel, program)
    _start_thread(_beat, channel, program, clock, rank)
    if int(os.environ["LOCAL_RANK"]) == 0:
        info = program.info
        channel.send(Ready(info) if isinstance(info, ModelInfo) else ImageReady(info))
    try:
        while True:
            with clock:
                program.step()
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        channel.send(Broken(rank, f"rank {rank} failed: {type(error).__name__}: {said}"))
        raise


def _load(run_dir: Path, rank: int, channel: RankChannel) -> RankProgram:
    work_dir = run_dir / WORK
    work_dir.mkdir(mode=0o700, exist_ok=True)
    program = load(read_spec(run_dir), rank, work_dir, channel.send)
    # What was loaded stays for good: no collection needs to walk over it while streams wait.
    gc.collect()
    gc.freeze()
    return program


def load(
    spec: RankSpec, rank: int, work_dir: Path, emit: Callable[[RankMessage], None]
) -> RankProgram:
    """The program of one rank. Raises: ConfigError."""
    context = RankContext(
        config=runner_config_adapter.validate_json(spec.config),
        rank=rank,
        world_size=spec.world_size,
        num_threads=spec.num_threads,
        work_dir=work_dir,
        emit=emit,
        rendezvous=spec.rendezvous,
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
        traceback.print_exc()
        os._exit(1)
    # The main thread may be deep in a step; nothing of a rank outlives its host.
    os._exit(0)


def _beat(channel: RankChannel, program: RankProgram, clock: _StepClock, rank: int) -> None:
    try:
        while True:
            full = program.occupancy()
            channel.send(
                Heartbeat(
                    rank,
                    clock.age,
                    full.running,
                    full.waiting,
                    full.kv_tokens_used,
                    full.kv_tokens_total,
                )
            )
            time.sleep(HEARTBEAT_S)
    except OSError:
        os._exit(0)


def _start_thread(target: Callable[..., None], *args: object) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


if __name__ == "__main__":
    main()
