"""Progress bars, shown on terminals only."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]


class ProgressBar(tqdm):  # type: ignore[misc]
    """A tqdm bar that prints nothing unless it writes to a terminal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # None makes tqdm check for a terminal.
        super().__init__(*args, **{"disable": None} | options)


def progress_bar(total: int, unit: str, description: str) -> ProgressBar:
    """A bar, as a context manager with `update(count)`."""
    return ProgressBar(total=total, unit=unit, unit_scale=unit == "B", desc=description)
