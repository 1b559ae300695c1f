"""Measurements that load torch run in a process of their own, so that none warms up another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.cache import ROOT, Unavailable, cache
from benchmarks.servers.base import environment


def fresh(module: str, threads: int, **arguments: object) -> Any:
    """What `python -m MODULE JSON` prints on its last line; the arguments go in as that JSON.

    Raises: Unavailable with the end of its log.
    """
    given = json.dumps({"threads": threads, **arguments})
    log = cache() / "logs" / f"{module}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", module, given],
            cwd=ROOT,
            env=environment({"OMP_NUM_THREADS": str(threads)}),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    if done.returncode != 0:
        raise Unavailable(f"{module} failed: " + " | ".join(log.read_text().splitlines()[-3:]))
    return json.loads(done.stdout.splitlines()[-1])


def arguments() -> dict[str, Any]:
    """In such a process: what it was given."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def say(found: object) -> None:
    """In such a process: what `fresh` returns; no thread of a library keeps it from ending."""
    print(json.dumps(found), flush=True)
    os._exit(0)
