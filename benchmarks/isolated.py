"""Measurements that load torch, each in a new process so that none warms up the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.cache import ROOT, Unavailable, cache
from benchmarks.servers.base import environment


def run_isolated(module: str, threads: int, **arguments: object) -> Any:
    """Run `python -m MODULE JSON` with the arguments as JSON. Returns the JSON of its last line.

    Raises: Unavailable with the last lines of its log.
    """
    arguments_json = json.dumps({"threads": threads, **arguments})
    log = cache() / "logs" / f"{module}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        process = subprocess.run(
            [sys.executable, "-m", module, arguments_json],
            cwd=ROOT,
            env=environment({"OMP_NUM_THREADS": str(threads)}),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    if process.returncode != 0:
        raise Unavailable(f"{module} failed: " + " | ".join(log.read_text().splitlines()[-3:]))
    return json.loads(process.stdout.splitlines()[-1])


def arguments() -> dict[str, Any]:
    """The arguments of `run_isolated`; called in the new process."""
    values: dict[str, Any] = json.loads(sys.argv[1])
    return values


def exit_with(result: object) -> None:
    """Return `result` from `run_isolated`, and exit; called in the new process."""
    print(json.dumps(result), flush=True)
    # A library's thread may keep a normal exit waiting.
    os._exit(0)
