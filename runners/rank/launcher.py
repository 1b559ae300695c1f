"""`python -m runners.rank.launcher RUN_DIR PARENT_PID`: starts and watches one node's ranks.

A separate process, because torch's elastic tools import torch, which the HTTP worker must not. It
ends all ranks when its stdin closes or when any rank ends, and writes the reason to `outcome.json`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    RunProcsResult,
    Std,
    start_processes,
)

from runners.config.base import BaseRunnerConfig
from runners.protocol.environment import rank_variables, visible_gpus
from runners.protocol.logs import is_json
from runners.protocol.process import die_with_parent, ignore_signals, wait_for_eof
from runners.protocol.spec import LOGS, OUTCOME, Outcome, read_spec, write_private

TAIL_LINES = 30
KILL_AFTER_S = 2
POLL_S = 0.1


def main() -> None:
    """Run until the ranks end or the host closes stdin."""
    run_dir = Path(sys.argv[1])
    die_with_parent(int(sys.argv[2]))
    stop = threading.Event()
    # It warns about every signal it sends; outcome.json has the cause.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    threading.Thread(target=_stop_at_eof, args=(stop,), daemon=True).start()
    spec = read_spec(run_dir)
    config = spec.load_config()
    ranks = _start(run_dir, config, spec.num_threads)
    # After the start, which sets other handlers.
    ignore_signals()
    result = None
    while result is None and not stop.is_set():
        result = ranks.wait(timeout=POLL_S, period=POLL_S)
    # The host may have closed stdin because a rank ended: a last look tells how it ended.
    result = result or ranks.wait(timeout=POLL_S, period=POLL_S / 2)
    ranks.close(death_sig=signal.SIGKILL, timeout=KILL_AFTER_S)
    if result is not None:
        write_private(run_dir / OUTCOME, _outcome(result, config.first_rank))
        sys.exit(1 if result.is_failed() else 0)


def _stop_at_eof(stop: threading.Event) -> None:
    wait_for_eof()
    stop.set()


def _start(run_dir: Path, config: BaseRunnerConfig, num_threads: int) -> PContext:
    logs = run_dir / LOGS
    logs.mkdir(mode=0o700, exist_ok=True)
    ranks = range(config.local_world_size)
    gpus = visible_gpus(config.gpu_share, torch.cuda.device_count())
    common = rank_variables(config, num_threads) | gpus
    return start_processes(
        name="rank",
        entrypoint=sys.executable,
        args={r: ("-u", "-m", "runners.rank.worker", str(run_dir), os.getpid()) for r in ranks},
        envs={
            r: common | {"RANK": str(config.first_rank + r), "LOCAL_RANK": str(r)} for r in ranks
        },
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), tee=Std.ALL),
        # By default torch puts the rank before each line, which would then be no JSON.
        log_line_prefixes=dict.fromkeys(ranks, "") if is_json() else None,
    )


def _outcome(result: RunProcsResult, first_rank: int) -> Outcome:
    if not result.failures:
        return Outcome(reason="the ranks ended without an error", stderr_tail=[])
    local, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
    rank = first_rank + local
    how = (
        f"was killed by {failure.signal_name()}"
        if failure.exitcode < 0
        else f"exited with status {failure.exitcode}"
    )
    tail = _tail(result.stderrs.get(local))
    return Outcome(reason=f"rank {rank} {how}", stderr_tail=tail, rank=rank)


def _tail(path: str | None) -> list[str]:
    try:
        with open(path or os.devnull, encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, TAIL_LINES)]
    except OSError:
        return []


if __name__ == "__main__":
    main()
