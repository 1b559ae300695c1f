"""The load balancer: MII's gRPC service in front of all replicas, which take turns.

It forwards messages as they are. A replica that is down is passed over until it is back; a request
that was in it fails with UNAVAILABLE, and a client that leaves leaves the replica too. (MII's own
lets a stream of a lost replica wait for ten minutes, and knows no leaving.)
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from runners.engines.mii.deployment.proto import OPTIONS, SERVER_OPTIONS, SERVICE, bind

UNARY, STREAM = "GeneratorReply", "GeneratorReplyStream"
TERMINATE = "Terminate"
PATIENCE_S = 3.0
"""How long a request waits while no replica is up."""
GRACE_S = 1.0
"""How long answers may take to leave after a Terminate."""


class Replica:
    """One replica's first rank, as the balancer sees it."""

    def __init__(self, number: int, port: int) -> None:
        self.number = number
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)

    def up(self) -> bool:
        """Whether it is connected; begins to connect if not."""
        state = self._channel.get_state(try_to_connect=True)
        return bool(state == grpc.ChannelConnectivity.READY)

    async def come_up(self) -> None:
        """Until it is connected."""
        while not self.up():
            await self._channel.wait_for_state_change(self._channel.get_state())

    def unary(self, method: str) -> Any:
        """A call of one answer, bytes to bytes."""
        return self._channel.unary_unary(SERVICE + method)

    def stream(self, method: str) -> Any:
        """A call of many answers, bytes to bytes."""
        return self._channel.unary_stream(SERVICE + method)


class Balancer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc carries no types
    """Forwards every call to the replica whose turn it is."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._replicas = [Replica(i, port) for i, port in enumerate(ports)]
        self._turns = itertools.cycle(self._replicas)
        self.terminated = asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """How a method is answered; None for one that is not MII's."""
        method = str(handler_call_details.method).removeprefix(SERVICE)
        if method == TERMINATE:
            return grpc.unary_unary_rpc_method_handler(self._terminate)
        if method == STREAM:

            async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
                replica = await self._next(context)
                call = replica.stream(method)(request)
                try:
                    async for message in call:
                        yield message
                except grpc.aio.AioRpcError as error:
                    await context.abort(*_blame(error, replica))
                finally:
                    call.cancel()

            return grpc.unary_stream_rpc_method_handler(stream)
        if method == UNARY:

            async def unary(request: bytes, context: Any) -> bytes:
                replica = await self._next(context)
                call = replica.unary(method)(request)
                try:
                    return bytes(await call)
                except grpc.aio.AioRpcError as error:
                    await context.abort(*_blame(error, replica))
                    raise  # not reached: abort raises
                finally:
                    call.cancel()

            return grpc.unary_unary_rpc_method_handler(unary)
        return None

    async def connect(self) -> None:
        """Until every replica is connected: else the first requests would all meet one of them."""
        await asyncio.gather(*(replica.come_up() for replica in self._replicas))

    async def watch(self) -> None:
        """Stay connected to every replica, so that a turn need not wait to find one down."""
        await asyncio.gather(*(self._keep_connected(replica) for replica in self._replicas))

    async def _keep_connected(self, replica: Replica) -> None:
        while True:
            await replica.come_up()
            await replica._channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

    async def _next(self, context: Any) -> Replica:
        for _ in range(2):
            for replica in itertools.islice(self._turns, len(self._replicas)):
                if replica.up():
                    return replica
            # One that just came up may not be connected yet.
            coming = [asyncio.create_task(replica.come_up()) for replica in self._replicas]
            await asyncio.wait(coming, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            for task in coming:
                task.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica is up; one is being started")
        raise AssertionError  # not reached: abort raises

    async def _terminate(self, request: bytes, _: Any) -> bytes:
        self.terminated.set()
        return request  # an Empty for an Empty


def _blame(error: grpc.aio.AioRpcError, replica: Replica) -> tuple[grpc.StatusCode, str]:
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return error.code(), f"replica {replica.number} went down with the request in flight"
    return error.code(), str(error.details())


async def balance(port: int, replicas: Sequence[int]) -> None:
    """Serve on loopback once all replicas do, until a client calls Terminate.

    Raises: ConfigError.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    balancer = Balancer(replicas)
    server.add_generic_rpc_handlers((balancer,))
    watching = asyncio.create_task(balancer.watch())
    try:
        bind(server, port)
        await balancer.connect()
        await server.start()
        await balancer.terminated.wait()
    finally:
        await server.stop(GRACE_S)
        watching.cancel()
