"""`python -m runners.rank.launcher RUN_DIR PARENT_PID`: starts and watches one node's ranks.

It ends all ranks when its stdin closes or when any rank fails, and writes the reason to
`outcome.json`. torch's elastic tools could do this too, but they import torch: two seconds of every
start, and 200 MB for every model.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, ParamSpec

from runners.config.base import BaseRunnerConfig
from runners.protocol.environment import rank_variables, visible_gpus
from runners.protocol.logs import is_json
from runners.protocol.process import die_with_parent, ignore_signals, wait_for_eof
from runners.protocol.spec import OUTCOME, Outcome, read_spec, write_private

TAIL_LINES = 30
MAX_LINE = 1 << 16
LAST_LOOK_S = 0.1
OUTPUT_S = 0.5
GPU_DRIVERS = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files of NVIDIA, of AMD, and of both on Windows' Linux."""
_P = ParamSpec("_P")
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


class _Rank:
    """A rank process, whose output is copied to this process's."""

    def __init__(self, rank: int, run_dir: Path, variables: dict[str, str]) -> None:
        self._rank = rank
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self.process = subprocess.Popen(
            (sys.executable, "-u", "-m", "runners.rank.worker", str(run_dir), str(os.getpid())),
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        # A rank's name before a line of JSON would make it none.
        prefix = b"" if is_json() else f"[rank{rank}]:".encode()
        assert self.process.stdout and self.process.stderr  # noqa: S101, PT018 - both are pipes
        self._copiers = (
            _start(_copy, self.process.stdout, sys.stdout.buffer, prefix, deque(maxlen=0)),
            _start(_copy, self.process.stderr, sys.stderr.buffer, prefix, self._tail),
        )

    def join(self) -> None:
        """Wait for its end; returns once what it has written is copied."""
        self.process.wait()
        for copier in self._copiers:
            # Not without a limit: a process that the rank has started may hold its stderr open.
            copier.join(OUTPUT_S)

    def failure(self) -> Outcome:
        """How this rank, which has failed, ended."""
        self.join()
        code = self.process.returncode or 0
        how = f"exited with status {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        tail = [line.decode(errors="replace").rstrip("\n") for line in [*self._tail]]
        return Outcome(reason=f"rank {self._rank} {how}", stderr_tail=tail, rank=self._rank)


def main() -> None:
    """Run until the ranks end or the host closes stdin."""
    run_dir = Path(sys.argv[1])
    die_with_parent(int(sys.argv[2]))
    ignore_signals()
    spec = read_spec(run_dir)
    config = spec.load_config()
    common = rank_variables(config, spec.num_threads) | _visible_gpus(config)
    local_ranks = range(config.first_rank, config.first_rank + config.local_world_size)
    ranks = [
        _Rank(rank, run_dir, common | {"RANK": str(rank), "LOCAL_RANK": str(local)})
        for local, rank in enumerate(local_ranks)
    ]
    outcome = _watch(ranks)
    # All at once, and with the outcome first: a rank may need seconds to free a GPU.
    for rank in ranks:
        rank.process.kill()
    if outcome is not None:
        write_private(run_dir / OUTCOME, outcome)
    for rank in ranks:
        rank.join()
    if outcome is not None and outcome.rank is not None:
        sys.exit(1)


def _watch(ranks: list[_Rank]) -> Outcome | None:
    """Wait until a rank fails or all end; None if the host closes stdin before."""
    ends: queue.SimpleQueue[_Rank | None] = queue.SimpleQueue()

    def report_end(rank: _Rank) -> None:
        rank.process.wait()
        ends.put(rank)

    def report_eof() -> None:
        wait_for_eof()
        ends.put(None)

    for rank in ranks:
        _start(report_end, rank)
    _start(report_eof)
    timeout = None
    running = len(ranks)
    while running:
        try:
            ended = ends.get(timeout=timeout)
        except queue.Empty:
            return None
        if ended is None:
            # The host may have closed stdin because a rank ended: a last look tells how.
            timeout = LAST_LOOK_S
        elif ended.process.returncode:
            return ended.failure()
        else:
            running -= 1
    return Outcome(reason="the ranks ended without an error", stderr_tail=[])


def _visible_gpus(config: BaseRunnerConfig) -> dict[str, str]:
    """The variable that limits the ranks to their model's share of the GPUs."""
    if config.gpu_share is None or not any(any(Path("/dev").glob(n)) for n in GPU_DRIVERS):
        return {}
    counted = subprocess.run(
        (sys.executable, "-c", _COUNT_GPUS), check=True, stdout=subprocess.PIPE, text=True
    )
    return visible_gpus(config.gpu_share, int(counted.stdout))


def _start(target: Callable[_P, None], *args: _P.args, **kwargs: _P.kwargs) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, kwargs=kwargs, daemon=True)
    thread.start()
    return thread


def _copy(source: IO[bytes], target: BinaryIO, prefix: bytes, tail: deque[bytes]) -> None:
    """Copy each line, and keep it in `tail`."""
    while line := source.readline(MAX_LINE):
        tail.append(line)
        # A closed output must not stop the rank; one that is not read stops the server, too.
        with contextlib.suppress(OSError, ValueError):
            target.write(prefix + line)
            target.flush()


if __name__ == "__main__":
    main()
