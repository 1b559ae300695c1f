"""The results as one JSON object, to which separate runs add.

Keys: `machine`, `versions` and `unavailable` (by server), `cells` (see `benchmarks.table`),
`failed` (by measurement), and one for each other measurement.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Cell = dict[str, Any]
"""One server under one load in one round: `table` (`wall` or `cpu`), `server`, `load` (a number of
clients, or `poisson`), `round`, and the fields of `metrics.Summary`, or the reason in
`skipped`."""


def load(path: Path) -> Results:
    """The results of earlier runs, or an empty object."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(results: Results, path: Path) -> None:
    """Write the results; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")


def replace_cells(results: Results, servers: list[str]) -> None:
    """Delete the results of earlier runs for these servers."""
    results["cells"] = [c for c in results.get("cells", []) if c["server"] not in servers]
    for key in ("versions", "unavailable"):
        results[key] = {k: v for k, v in results.get(key, {}).items() if k not in servers}


def values(results: Results, field: str, **where: object) -> list[float]:
    """A field of the cells that match `where`, by round; NaN where it is missing."""
    cells = [c for c in results.get("cells", []) if all(c.get(k) == v for k, v in where.items())]
    fields = [c.get(field) for c in sorted(cells, key=lambda c: int(c["round"]))]
    return [math.nan if value is None else value for value in fields]


def loads(results: Results, table: str) -> list[Any]:
    """The client counts of a table, ascending."""
    cells = results.get("cells", [])
    return sorted({c["load"] for c in cells if c["table"] == table and c["load"] != "poisson"})


def servers(results: Results, table: str) -> list[str]:
    """The servers of a table, in the order of `SERVERS`."""
    from benchmarks.servers import SERVERS

    names = dict.fromkeys(c["server"] for c in results.get("cells", []) if c["table"] == table)
    return [n for n in SERVERS if n in names] + [n for n in names if n not in SERVERS]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
