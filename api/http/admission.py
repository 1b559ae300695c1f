"""Admission: how many sequences may be in the house at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runners.contracts.errors import InvalidRequest, Overloaded


class Admission:
    """Counts sequences in; `limit` of them, running and waiting together, fill the house.

    `what` they are called: sequences, pictures.
    """

    def __init__(self, limit: int, what: str = "sequences") -> None:
        self.limit = limit
        self.what = what
        self.inside = 0

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold room for `count` sequences.

        Raises: Overloaded if there is no room now, InvalidRequest if there never can be.
        """
        if count > self.limit:
            raise InvalidRequest(
                f"the request asks for {count} {self.what}; this server holds {self.limit} at most"
            )
        if self.inside + count > self.limit:
            raise Overloaded(
                f"the server is full: {self.inside} of {self.limit} {self.what} are in work; "
                "try again shortly"
            )
        self.inside += count
        try:
            yield
        finally:
            self.inside -= count
