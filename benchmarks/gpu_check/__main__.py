"""`python -m benchmarks.gpu_check`: certify Triptych on one GPU, part by part.

A part that has a complete result for this card and these sources is not run again. The exit status
is 0 if no check of the chosen parts failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cache import ROOT, cache
from benchmarks.gpu_check import report
from benchmarks.gpu_check.recorder import Result, failures, passed


class Part(NamedTuple):
    """A part of the check."""

    title: str
    module: str


KERNELS = "benchmarks.gpu_check.kernels"
PARTS = {
    "a": Part("kernels against float64", KERNELS),
    "b": Part("tokens of generate, and equal bits", "benchmarks.gpu_check.tokens"),
    "c": Part("throughput of 8 billion parameters", "benchmarks.gpu_check.throughput"),
    "d": Part("MII on FastGen's kernels", "benchmarks.gpu_check.fastgen"),
    "e": Part("DeepSpeed and NCCL", "benchmarks.gpu_check.nccl"),
    "f": Part("images", "benchmarks.gpu_check.images"),
    "g": Part("start and latency of a rank", "benchmarks.gpu_check.latency"),
}
LIMIT_S = 540
"""Seconds that a part may take."""
GRACE_S = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    args = _parser().parse_args(argv)
    machine = _describe(args.cpu)
    if machine["card"] is None:
        print("there is no GPU; --cpu shows that the check runs, and says nothing about speed")
        return 2
    folder = args.output or (cache() / "gpu-dry-run" if args.cpu else report.FOLDER)
    file = report.file_of(machine["card"], folder)
    print(f"{machine['card']}: {file}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) if args.cpu else cache() / "gpu-check"
        try:
            for key in args.parts:
                result = report.load(file).get("parts", {}).get(key)
                if not (args.force or args.cpu) and _is_current(result):
                    print(f"--- {key}: {PARTS[key].title}: already measured", flush=True)
                    continue
                print(f"--- {key}: {PARTS[key].title}", flush=True)
                new = run(PARTS[key], models, dry=args.cpu, limit_s=args.limit)
                new |= {"title": PARTS[key].title, "versions": machine["versions"]} | stamp()
                report.add(file, machine["card"], key, new)
        except KeyboardInterrupt:
            print("ended; the parts that are complete are kept")
            return 130
        finally:
            if folder == report.FOLDER:
                report.write_section(report.RESULTS, report.FOLDER)
    return summarise(report.load(file)["parts"], args.parts)


def run(part: Part, folder: Path, *, dry: bool, limit_s: float = LIMIT_S) -> Result:
    """The result of a part in a new process.

    In a dry run, only the kernels have one, since Triton's interpreter is for a whole process. A
    process that takes longer is ended, and what it had measured is kept.
    Raises: KeyboardInterrupt if this process is ended meanwhile.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        if dry and part.module != KERNELS:
            from benchmarks.gpu_check.device import Device
            from benchmarks.gpu_check.part import run_part

            run_part(part.module, path, Device(dry=True), folder)
            return report.load(path)
        reason = run_process(part.module, path, folder, limit_s, dry=dry)
        result = report.load(path) or {"checks": [], "figures": {}, "skipped": {}}
    if reason:
        result |= {"state": "failed", "reason": reason}
        print(f"  {reason}", flush=True)
    return result


def run_process(module: str, path: Path, folder: Path, limit_s: float, *, dry: bool = False) -> str:
    """Run a part in a new process group. Returns why it has no complete result, or nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.part", module, str(path)]
    command += ["--folder", str(folder), "--limit", str(limit_s), *(["--cpu"] if dry else [])]
    variables = {"TRITON_INTERPRET": "1"} if dry else {}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, start_new_session=True
    )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"it took longer than {limit_s:.0f} s"
    finally:
        _end(process)
    return f"its process ended with status {status}" if status else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is None or number == signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def summarise(parts: dict[str, Result], chosen: Sequence[str]) -> int:
    """Print how the chosen parts ended. Returns the exit status."""
    print("---")
    for key in chosen:
        result = parts[key]
        print(f"{key} {report.verdict(result)}: {result['title']}")
        for line in failures(result):
            print(f"    {line}")
        if reason := result.get("reason"):
            print(f"    {reason}")
    return 0 if all(passed(parts[key]) for key in chosen) else 1


def stamp() -> dict[str, str]:
    """The commit, and a digest of the sources that the check depends on.

    The digest decides whether a result is current: a machine may have the files without git.
    """
    from benchmarks.machine import commit

    return {"commit": commit(), "source": report.source_digest()}


def _is_current(result: Result | None) -> bool:
    return (
        result is not None
        and result["state"] in ("complete", "skipped")
        and result["source"] == report.source_digest()
    )


def _describe(dry: bool) -> dict[str, Any]:
    if dry:
        from benchmarks.gpu_check.device import Device
        from benchmarks.gpu_check.part import describe

        return describe(Device(dry=True))
    command = [sys.executable, "-m", "benchmarks.gpu_check.part"]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    description: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return description


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    add = parser.add_argument
    titles = "; ".join(f"{key}: {part.title}" for key, part in PARTS.items())
    add("--parts", type=_keys, default=list(PARTS), metavar="A,B", help=titles)
    add("--force", action="store_true", help="also run the parts that have a result")
    add("--cpu", action="store_true", help="dry run with tiny sizes, without a GPU")
    add("--output", type=Path, metavar="FOLDER", help="where the result goes (default: benchmarks)")
    add("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for one part")
    return parser


def _keys(value: str) -> list[str]:
    keys = value.split(",")
    if unknown := [key for key in keys if key not in PARTS]:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}; choose from {', '.join(PARTS)}"
        )
    return keys


if __name__ == "__main__":
    # SIGTERM must end the part's processes as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
