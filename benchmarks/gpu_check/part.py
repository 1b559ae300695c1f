"""One part of the check, in its own process: `python -m benchmarks.gpu_check.part MODULE FILE`.

Without arguments it prints the card and its software as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.recorder import Recorder, Skipped


@dataclass(frozen=True)
class Context:
    """What the function `run` of a part gets."""

    record: Recorder
    device: Device
    folder: Path
    """For models; kept between parts, on a GPU also between runs."""
    ends: float = math.inf
    """When the part is ended, by `time.monotonic`."""


def run_part(
    module: str, path: Path, device: Device, folder: Path, limit_s: float = math.inf
) -> None:
    """Call `module.run` and end its result, whatever happens."""
    record = Recorder(path, dry=device.dry)
    start = time.monotonic()
    state, reason = "complete", ""
    try:
        importlib.import_module(module).run(Context(record, device, folder, start + limit_s))
    except Skipped as error:
        state, reason = "skipped", str(error)
        print(f"  skipped: {reason}", flush=True)
    except Exception as error:  # of any library; the other parts go on
        traceback.print_exc()
        state, reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:500]
    except BaseException:
        record.end("interrupted", time.monotonic() - start, "it was ended")
        raise
    record.end(state, time.monotonic() - start, reason)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.part")
    parser.add_argument("module", nargs="?")
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--limit", type=float, default=math.inf)
    args = parser.parse_args(argv)
    device = Device(dry=args.cpu)
    if args.module is None:
        print(json.dumps(describe(device)))
        return
    run_part(args.module, args.path, device, args.folder, args.limit)
    sys.stdout.flush()
    # A library's thread may keep a normal exit waiting.
    os._exit(0)


def describe(device: Device) -> dict[str, Any]:
    """The card and its software. `card` is None if there is no GPU."""
    import torch

    exists = device.dry or torch.cuda.is_available()
    return {"card": device.name if exists else None, "versions": device.versions()}


if __name__ == "__main__":
    main()
