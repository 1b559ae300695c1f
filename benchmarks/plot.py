"""Draws results.svg from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.metrics import spread
from benchmarks.results import Results, loads, servers, values
from benchmarks.servers import EIGHT_BIT, TRIPTYCH_SERVERS

PANELS = (
    ("tokens_per_second", "output tokens per second", False),
    ("ttft_p95", "time to first token, p95, s", True),
)


def draw(results: Results, path: Path) -> None:
    """Draw a line per server over the number of clients, with minimum and maximum of the rounds."""
    # Text is not converted to paths, and equal results give an identical file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "triptych"}):
        figure = Figure(figsize=(11, 5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            _panel(axes, results, *panel)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Any, results: Results, field: str, title: str, logarithmic: bool) -> None:
    clients = loads(results, "wall")
    for number, name in enumerate(servers(results, "wall")):
        points = [
            spread(values(results, field, table="wall", server=name, load=c)) for c in clients
        ]
        middle, low, high = zip(*points, strict=True)
        below = [a - b for a, b in zip(middle, low, strict=True)]
        above = [b - a for a, b in zip(middle, high, strict=True)]
        axes.errorbar(
            range(len(clients)), middle, yerr=[below, above], label=name, marker="o", markersize=4,
            capsize=3, color=f"C{number}", linewidth=3 if name in TRIPTYCH_SERVERS else 1.2,
            linestyle="--" if name in EIGHT_BIT else "-",
        )  # fmt: skip
    axes.set_xticks(range(len(clients)), [str(c) for c in clients])
    axes.set_xlabel("concurrent clients")
    axes.set_title(title)
    axes.set_yscale("log" if logarithmic else "linear")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
