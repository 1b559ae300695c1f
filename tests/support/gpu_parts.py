"""A part of the GPU check that ends as the variable GPU_PART says, after it measured something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from benchmarks.gpu_check.part import Context


def run(check: Context) -> None:
    check.record.figure("measured", 1.0)
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
