"""How the first rank of a replica tells the others what to compute, on loopback only.

MII publishes each step over ZMQ, gives the others a second to subscribe, and hopes. A publisher
that hears of its subscriptions (XPUB) can wait for every rank instead.
"""

from __future__ import annotations

from typing import Any

import zmq

LATE_RANK_S = 600
"""How long a rank may take to load longer than the first did."""


class LoopbackSocket(zmq.Socket[Any]):
    """A socket that other machines can not reach."""

    def bind(self, addr: str) -> Any:
        """Bind, on loopback where every interface was asked for."""
        return super().bind(addr.replace("://*:", "://127.0.0.1:"))

    def wait_for(self, subscribers: int) -> None:
        """Until so many subscribed. Raises: TimeoutError."""
        self.setsockopt(zmq.RCVTIMEO, LATE_RANK_S * 1000)
        try:
            for _ in range(subscribers):
                self.recv()
        except zmq.Again:
            raise TimeoutError(f"not all ranks came within {LATE_RANK_S} s") from None


class LoopbackContext(zmq.Context[Any]):
    """Makes such sockets; publishers hear of every subscription and drop nothing."""

    _socket_class = LoopbackSocket

    def socket(self, socket_type: int, *args: Any, **kwargs: Any) -> Any:
        """A socket; for PUB, one that does the same and can wait for its subscribers."""
        if socket_type != zmq.PUB:
            return super().socket(socket_type, *args, **kwargs)
        made = super().socket(zmq.XPUB, *args, **kwargs)
        made.setsockopt(zmq.XPUB_VERBOSE, 1)
        made.setsockopt(zmq.SNDHWM, 0)
        return made
