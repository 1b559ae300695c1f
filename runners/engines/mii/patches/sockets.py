"""The sockets over which rank 0 of a replica sends each step to the other ranks, on loopback only.

MII publishes every step over ZMQ and gives the other ranks one second to subscribe; a rank that is
later than that misses steps. A publisher that receives its subscriptions (XPUB) waits for every
rank instead.
"""

from __future__ import annotations

from typing import Any

import zmq
from typing_extensions import override

LATE_RANK_S = 600
"""How much longer than rank 0 another rank may take to load."""


class LoopbackSocket(zmq.Socket[Any]):
    """A socket that other machines cannot reach."""

    @override
    def bind(self, addr: str) -> Any:
        # MII binds to every interface.
        return super().bind(addr.replace("://*:", "://127.0.0.1:"))

    def wait_for(self, subscribers: int) -> None:
        """Wait for a number of subscriptions. Raises: TimeoutError."""
        self.setsockopt(zmq.RCVTIMEO, LATE_RANK_S * 1000)
        try:
            for _ in range(subscribers):
                self.recv()
        except zmq.Again:
            raise TimeoutError(f"not all ranks connected within {LATE_RANK_S} s") from None


class LoopbackContext(zmq.Context[Any]):
    """Makes such sockets. A publisher receives every subscription and drops no message."""

    _socket_class = LoopbackSocket

    @override
    def socket(self, socket_type: int, *args: Any, **kwargs: Any) -> Any:
        if socket_type != zmq.PUB:
            return super().socket(socket_type, *args, **kwargs)
        publisher = super().socket(zmq.XPUB, *args, **kwargs)
        publisher.setsockopt(zmq.XPUB_VERBOSE, 1)
        publisher.setsockopt(zmq.SNDHWM, 0)
        return publisher
