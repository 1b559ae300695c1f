"""`python -m benchmarks`: measure, and write RESULTS.md, results.svg and results.json."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    gap,
    images,
    limit,
    machine,
    memory,
    mii_pipeline,
    overhead,
    overload,
    plot,
    quality,
    report,
    results,
    split,
    table,
)
from benchmarks.cache import Unavailable, cache
from benchmarks.servers import SERVERS

PARTS = (
    *("table", "limit", "overhead", "gap", "memory", "quality", "split", "mii", "images"),
    "overload",
)
OVERHEAD_CONCURRENCIES = (1, 16, 64)
MII_CONCURRENCIES = (1, 16)
LIMIT_CONCURRENCIES = (1, 4, 8, 16, 32)
HERE = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    # SIGTERM must stop the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # A quick run only shows that everything works. Its numbers must not replace the real ones.
    folder = cache() / "quick" if args.quick else HERE
    data = results.load(folder / "results.json")
    if not args.render:
        data["machine"] = machine.describe()
        for part in args.only or PARTS:
            _measure(part, args, data, lambda: results.save(data, folder / "results.json"))
    (folder / "RESULTS.md").write_text(report.render(data))
    plot.draw(data, folder / "results.svg")
    print(f"written: {folder / 'RESULTS.md'}")


def _measure(
    part: str, args: argparse.Namespace, data: results.Results, save: Callable[[], None]
) -> None:
    measure: dict[str, Callable[[], Any]] = {
        "limit": lambda: limit.measure(args.threads, (1, 4) if args.quick else LIMIT_CONCURRENCIES),
        "overhead": lambda: overhead.measure(
            args.threads,
            (1, 4) if args.quick else OVERHEAD_CONCURRENCIES,
            1 if args.quick else args.rounds,
            extra=2 if args.quick else overhead.EXTRA,
        ),
        "gap": lambda: gap.measure(
            args.threads, long_prompt=1000 if args.quick else gap.LONG_PROMPT
        ),
        "quality": lambda: quality.measure(args.threads),
        "images": lambda: images.measure(
            args.threads,
            1 if args.quick else args.rounds,
            per_client=1 if args.quick else images.PER_CLIENT,
        ),
        "split": lambda: split.measure(
            (1, 4) if args.quick else (1, 16), 1 if args.quick else args.rounds
        ),
        "mii": lambda: mii_pipeline.measure(
            args.threads,
            MII_CONCURRENCIES,
            1 if args.quick else args.rounds,
            batches=1 if args.quick else mii_pipeline.BATCHES,
        ),
        "overload": lambda: overload.measure(
            args.threads, seconds=10 if args.quick else overload.SECONDS
        ),
        "memory": lambda: memory.measure(
            args.threads, requests=32 if args.quick else memory.REQUESTS
        ),
    }
    print(f"--- {part}", flush=True)
    if part == "table":
        table.measure(_plan(args), data, save)
        return
    failed = data.setdefault("failed", {})
    failed.pop(part, None)
    try:
        data[part] = measure[part]()
    except Unavailable as error:
        print(f"{part}: {error}")
        failed[part] = str(error)
    save()


def _plan(args: argparse.Namespace) -> table.Plan:
    options: dict[str, Any] = dict(table.QUICK) if args.quick else {"rounds": args.rounds}
    if args.concurrency:
        options["concurrencies"] = args.concurrency
    options["servers"] = [SERVERS[name] for name in args.servers]
    return table.Plan(threads=args.threads, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--servers", type=_names(SERVERS), default=list(SERVERS), metavar="A,B",
        help=f"servers to measure: {', '.join(SERVERS)}")  # fmt: skip
    add("--only", type=_names(PARTS), metavar="A,B", help=f"parts to measure: {', '.join(PARTS)}")
    add("--concurrency", type=_numbers, metavar="N,M", help="client counts of the table")
    add("--rounds", type=int, default=2, help="measurements of each server (default: 2)")
    add("--threads", type=int, default=2, help="CPU threads of each server (default: 2)")
    add("--quick", action="store_true", help="only a few requests each; writes to .bench/quick")
    add("--render", action="store_true", help="only write the report again, from results.json")
    return parser


def _names(known: Sequence[str] | dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(value: str) -> list[str]:
        names = value.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}"
            )
        return names

    return parse


def _numbers(value: str) -> list[int]:
    return sorted(int(number) for number in value.split(","))


if __name__ == "__main__":
    main()
