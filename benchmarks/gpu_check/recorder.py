"""What a part of the check measures and finds: checks, bars and figures, in a file as they come.

The file is complete JSON at any time, so a part that is interrupted keeps what it had measured.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""`state` (running, complete, skipped, failed or interrupted), `reason` (of the last three),
`seconds`, `checks`, `figures`, `skipped` (name to reason) and `headlines`."""


class Skipped(Exception):
    """A part, or a step of one, is impossible here; the message gives the cause."""


class Recorder:
    """Collects the result of one part, prints it, and keeps it in a file."""

    def __init__(self, path: Path, *, dry: bool = False) -> None:
        self._path = path
        self._dry = dry
        self.result: Result = {
            "state": "running",
            "checks": [],
            "figures": {},
            "skipped": {},
            "headlines": [],
        }

    def check(self, name: str, passed: bool, detail: str = "") -> bool:
        """Record whether something holds; `detail` says what was seen."""
        return self._add({"name": name, "passed": bool(passed), "detail": detail})

    def bar(
        self,
        name: str,
        value: float,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        unit: str = "",
    ) -> bool:
        """Record a figure that must be within bounds. NaN is not. A dry run has no bars."""
        above = minimum is None or value >= minimum
        below = maximum is None or value <= maximum
        bound = f"at least {minimum}" if minimum is not None else f"at most {maximum}"
        unit = f" {unit}" if unit else ""
        self.figure(name, value)
        if self._dry:
            return True
        passed = above and below and not math.isnan(value)
        return self._add(
            {"name": name, "passed": passed, "detail": f"{value:.4g}{unit}, {bound}", "bar": True}
        )

    def figure(self, name: str, value: Any) -> None:
        """Record a number, or a list or object of them."""
        self.result["figures"][name] = value
        print(f"  {name}: {_short(value)}", flush=True)
        self._save()

    def headline(self, text: str) -> None:
        """Record a sentence for the report."""
        self.result["headlines"].append(text)
        self._save()

    def skip(self, name: str, reason: str) -> None:
        """Record that a step of the part was left out."""
        self.result["skipped"][name] = reason
        print(f"  {name}: skipped: {reason}", flush=True)
        self._save()

    def end(self, state: str, seconds: float, reason: str = "") -> None:
        """Record how the part ended."""
        self.result |= {"state": state, "seconds": round(seconds, 1)}
        if reason:
            self.result["reason"] = reason
        self._save()

    def _add(self, check: dict[str, Any]) -> bool:
        self.result["checks"].append(check)
        verdict = "pass" if check["passed"] else "FAIL"
        print(f"  {verdict} {check['name']}: {check['detail']}".rstrip(": "), flush=True)
        self._save()
        return bool(check["passed"])

    def _save(self) -> None:
        write_json(self.result, self._path)


def passed(result: Result) -> bool:
    """Whether a part ended without a failed check; one that was skipped has none."""
    return result["state"] in ("complete", "skipped") and not failures(result)


def failures(result: Result) -> list[str]:
    """The checks that failed, each with its detail."""
    return [f"{c['name']}: {c['detail']}" for c in result["checks"] if not c["passed"]]


def write_json(value: Any, path: Path) -> None:
    """Replace a JSON file at once; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)
