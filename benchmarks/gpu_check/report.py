"""The results of a card as JSON, and the section about GPUs in RESULTS.md.

The section is between two comments, so that `make bench` and `make gpu-check` can each write their
part of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.cache import ROOT
from benchmarks.gpu_check.recorder import Result, failures, passed, write_json

FOLDER = ROOT / "benchmarks"
RESULTS = FOLDER / "RESULTS.md"
BEGIN, END = "<!-- written by make gpu-check -->", "<!-- end of make gpu-check -->"
NOT_RUN = "not run yet"
SOURCES = ("runners", "benchmarks/gpu_check")


def slug(card: str) -> str:
    """A card's name as a part of a file name: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def file_of(card: str, folder: Path = FOLDER) -> Path:
    """Where the results of a card are."""
    return folder / f"gpu-{slug(card)}.json"


def load(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is none."""
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value


def add(path: Path, card: str, key: str, result: Result) -> None:
    """Replace the result of one part; those of the others remain."""
    data = load(path)
    parts = data.get("parts", {}) | {key: result}
    write_json({"card": card, "parts": dict(sorted(parts.items()))}, path)


def source_digest() -> str:
    """A digest of the sources that the check runs."""
    digest = hashlib.sha256()
    for tree in SOURCES:
        for path in sorted((ROOT / tree).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def verdict(result: Result) -> str:
    """How a part ended, in a word."""
    if result["state"] != "complete":
        return str(result["state"])
    return "passed" if passed(result) else "FAILED"


def line(card: str, key: str, result: Result) -> str:
    """One row of the table: a part on a card."""
    checks = result["checks"]
    count = f"{len(checks) - len(failures(result))} of {len(checks)}"
    bars = [f"{c['name']}: {c['detail']}" for c in checks if c.get("bar")]
    remarks = [*result.get("headlines", ()), *bars, *(f for f in failures(result) if f not in bars)]
    remarks += [f"{name}: {reason}" for name, reason in result["skipped"].items()]
    if reason := result.get("reason"):
        remarks.append(reason)
    cells = [key, result["title"], card, verdict(result), count, "; ".join(remarks)]
    cells.append(result.get("commit", ""))
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def section(folder: Path = FOLDER) -> str:
    """The section about GPUs, between its two comments, from the results in a folder."""
    rows = []
    for path in sorted(folder.glob("gpu-*.json")):
        data = load(path)
        rows += [line(data["card"], key, result) for key, result in data["parts"].items()]
    head = ["part", "", "card", "result", "checks passed", "bars and remarks", "Triptych"]
    table = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *rows]
    body = "\n".join(table) if rows else f"`make gpu-check`: {NOT_RUN}."
    return f"{BEGIN}\n## On a GPU\n\n{body}\n{END}"


def write_section(path: Path, folder: Path) -> None:
    """Replace the section in RESULTS.md, or append it; the results are in `folder`."""
    text = path.read_text() if path.exists() else ""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    new = section(folder)
    if pattern.search(text):
        text = pattern.sub(lambda _: new, text)
    else:
        text = f"{text.rstrip()}\n\n{new}\n".lstrip()
    path.write_text(text)
