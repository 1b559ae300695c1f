"""A part of the GPU check that ends as the variable GPU_PART says, after it measured something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.peers import in_new_process
from runners.text.gpu.invariance import installed


def run(check: Context) -> None:
    check.record.figure("measured", 1.0)
    check.record.figure("left_s", check.ends - time.monotonic())
    check.record.check("holds", True)
    match os.environ["GPU_PART"]:
        case "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            check.record.figure("child", child.pid)
            child.wait()
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            raise ValueError("a cause\nand more")


@in_new_process
def peer(device: Device, end: str, *, repeat: int) -> Iterator[tuple[int, bool]]:
    """Its process, and whether operators are replaced in it, before it ends as `end` says."""
    for _ in range(repeat):
        yield os.getpid(), installed(device.target.type)
    match end:
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            raise ValueError("a cause\nand more")
