"""Ranks forked from one process that has imported torch, in place of those that a launcher starts.

A rank spends seconds of CPU time on importing torch, transformers and its engine, and its launcher
two more. A fork of the fork server has all of it at once. The rest is as in service: a process for
each rank, `runners.rank.worker`, the channel, the process groups. Tests of the launcher, of the
environment of a rank and of the end of a rank group start real ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import connection, context, current_process, forkserver, get_context
from pathlib import Path

import pytest

from runners.host.session import RankSession
from runners.protocol.environment import rank_variables
from runners.protocol.process import child_environment
from runners.protocol.spec import OUTCOME, Outcome, RankSpec, write_private
from runners.rank import worker
from tests.support.processes import FORKED_RANKS

_MODULES = [
    "deepspeed",
    "runners.engines.accelerate",
    "runners.engines.deepspeed.load",
    "runners.engines.images",
    "runners.engines.mii.patches",
    "runners.engines.mii.persistent",
]
# What these modules read when they are imported.
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "GOMP_SPINCOUNT": "20000",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Have the rank groups that start meanwhile fork their ranks."""
    fork_context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankSession, "_launch", _launch)
        yield


def fork_context() -> context.ForkServerContext:
    """Starts processes that have imported torch, transformers and DeepSpeed."""
    forks = get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        forks.set_forkserver_preload(_MODULES)
        forkserver.ensure_running()
    return forks


class ForkedRanks:
    """The ranks of one session, as `RankSession` sees the launcher: a process with a stdin."""

    def __init__(self, run_dir: Path, spec: RankSpec) -> None:
        config = spec.load_config()
        shared = child_environment() | rank_variables(config, spec.num_threads)
        self._run_dir = run_dir
        self._ranks: dict[int, context.ForkServerProcess] = {}
        for local in range(config.local_world_size):
            rank = config.first_rank + local
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(local)}
            self._ranks[rank] = process = fork_context().Process(
                target=_run, args=(str(run_dir), variables), daemon=True
            )
            process.start()
            assert process.pid is not None
            FORKED_RANKS.add(process.pid)
        self.stdin = self

    def close(self) -> None:
        """End the ranks, as the launcher does at the end of its stdin."""
        for process in self._ranks.values():
            process.kill()

    kill = close

    async def wait(self) -> None:
        """Wait until one rank ends, and end the others."""
        sentinels = [process.sentinel for process in self._ranks.values()]
        await asyncio.to_thread(connection.wait, sentinels)
        rank, code = next((r, p.exitcode) for r, p in self._ranks.items() if p.exitcode is not None)
        self.close()
        for process in self._ranks.values():
            await asyncio.to_thread(process.join)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        with contextlib.suppress(OSError):  # the folder is gone with its session
            outcome = Outcome(reason=f"rank {rank} {how}", stderr_tail=[], rank=rank)
            write_private(self._run_dir / OUTCOME, outcome)


async def _launch(session: RankSession) -> None:
    ranks = ForkedRanks(session._run_dir, session._spec)
    session._launcher = ranks  # type: ignore[assignment]
    session._exited = asyncio.create_task(ranks.wait())  # type: ignore[arg-type]
    session._exited.add_done_callback(lambda _: session.end("the rank processes ended"))


def _run(run_dir: str, variables: dict[str, str]) -> None:
    """In the forked process: be the rank."""
    os.environ.clear()
    os.environ |= variables
    # The rank's own processes come from this fork server too: `TokenizerProcess`.
    forkserver.ensure_running = lambda: None
    vars(forkserver._forkserver)["ensure_running"] = lambda: None
    vars(current_process())["_config"]["daemon"] = False
    sys.argv[1:] = [run_dir, str(os.getppid())]
    worker.main()
