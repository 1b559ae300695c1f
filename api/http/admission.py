"""Admission: how many sequences a model accepts at once, running and queued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runners.contracts.errors import InvalidRequest, Overloaded


class Admission:
    """Counts the sequences that are admitted; there are never more than `limit`.

    `noun` is what errors call them: sequences or images.
    """

    def __init__(self, limit: int, noun: str = "sequences") -> None:
        self.limit = limit
        self.noun = noun
        self.admitted = 0

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Admit `count` sequences until the block is left.

        Raises: Overloaded if they exceed the limit now, InvalidRequest if they always will.
        """
        if count > self.limit:
            raise InvalidRequest(
                f"the request asks for {count} {self.noun}; this server admits at most {self.limit}"
            )
        if self.admitted + count > self.limit:
            raise Overloaded(
                f"the server is full: {self.admitted} of {self.limit} {self.noun} are running or "
                "queued; try again shortly"
            )
        self.admitted += count
        try:
            yield
        finally:
            self.admitted -= count
