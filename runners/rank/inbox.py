"""The queue between a rank's reader thread and its steps."""

from __future__ import annotations

import queue
from typing import Generic, TypeVar

Item = TypeVar("Item")

IDLE_S = 0.5
"""Seconds that an idle step waits for work, so that the ranks of a group stay in touch."""


class Inbox(Generic[Item]):
    """Items in the order of arrival. Any thread puts, one thread takes."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()

    def __len__(self) -> int:
        return self._queue.qsize()

    def put(self, item: Item) -> None:
        """Add an item."""
        self._queue.put(item)

    def take(self, *, wait: bool, limit: int | None = None) -> list[Item]:
        """All items, or the first `limit`; with `wait`, waits up to `IDLE_S` for the first."""
        items: list[Item] = []
        try:
            items.append(self._queue.get(block=wait, timeout=IDLE_S))
            while limit is None or len(items) < limit:
                items.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return items
