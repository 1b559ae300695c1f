"""The load balancer of a deployment: MII's gRPC service in front of all replicas, which take turns.

A process that the supervisor starts. It forwards messages unread. A replica that is down is skipped
until it is back, and so is one that sends no heartbeats while another does. A request that was on a
lost replica fails with UNAVAILABLE, and a request whose client leaves is cancelled on its replica.
(In MII's own balancer the stream of a lost replica waits ten minutes, and nothing is cancelled.)

gRPC's own `round_robin` policy over one channel was tried in place of `Replica`. It takes turns and
skips lost replicas as well, but it tells neither which replica a failed request was on nor whether
all replicas are connected; until they are, every request goes to the first.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from typing_extensions import override

from runners.engines.mii.deployment.heartbeats import HEARTBEAT_S, Watch
from runners.engines.mii.deployment.ports import LOOPBACK
from runners.engines.mii.deployment.proto import OPTIONS, SERVER_OPTIONS, SERVICE, bind

UNARY, STREAM, TERMINATE = (
    SERVICE + method for method in ("GeneratorReply", "GeneratorReplyStream", "Terminate")
)
PATIENCE_S = 3.0
"""How long a request waits while no replica is up."""
SILENT_S = 3.0
"""A replica without a heartbeat for so long gets no request while another one has them."""
GRACE_S = 1.0
"""How long running calls may take to end after a Terminate."""


class Replica:
    """The connection to a replica's first rank."""

    def __init__(self, number: int, port: int) -> None:
        self.number = number
        self._channel = grpc.aio.insecure_channel(f"{LOOPBACK}:{port}", options=OPTIONS)

    def is_up(self) -> bool:
        """Whether it is connected; starts to connect if not."""
        state = self._channel.get_state(try_to_connect=True)
        return bool(state == grpc.ChannelConnectivity.READY)

    async def wait_until_up(self) -> None:
        """Wait until it is connected."""
        while not self.is_up():
            await self._channel.wait_for_state_change(self._channel.get_state())

    async def stay_connected(self) -> None:
        """Reconnect whenever the connection is lost, until cancelled."""
        while True:
            await self.wait_until_up()
            await self._channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

    def unary(self, request: bytes) -> Any:
        """A call with one reply, to be awaited."""
        return self._channel.unary_unary(UNARY)(request)

    def stream(self, request: bytes) -> Any:
        """A call that yields replies."""
        return self._channel.unary_stream(STREAM)(request)


class Balancer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Forwards every call to the next replica that is up."""

    def __init__(self, ports: Sequence[int], is_silent: Callable[[int], bool]) -> None:
        self._is_silent = is_silent
        self._replicas = [Replica(i, port) for i, port in enumerate(ports)]
        self._turns = itertools.cycle(self._replicas)
        self.terminated = asyncio.Event()
        self._handlers = {
            UNARY: grpc.unary_unary_rpc_method_handler(self._unary),
            STREAM: grpc.unary_stream_rpc_method_handler(self._stream),
            TERMINATE: grpc.unary_unary_rpc_method_handler(self._terminate),
        }

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(handler_call_details.method)

    async def wait_until_up(self) -> None:
        """Wait until every replica is connected: else the first requests would all go to one."""
        await asyncio.gather(*(replica.wait_until_up() for replica in self._replicas))

    async def stay_connected(self) -> None:
        """Reconnect to lost replicas, so that no request has to wait for that, until cancelled."""
        await asyncio.gather(*(replica.stay_connected() for replica in self._replicas))

    async def _unary(self, request: bytes, context: Any) -> bytes:
        replica = await self._next(context)
        call = replica.unary(request)
        try:
            return bytes(await call)
        except grpc.aio.AioRpcError as error:
            await context.abort(*_status(error, replica))
            raise  # not reached: abort raises
        finally:
            call.cancel()

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        replica = await self._next(context)
        call = replica.stream(request)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            await context.abort(*_status(error, replica))
        finally:
            call.cancel()

    async def _terminate(self, request: bytes, _: Any) -> bytes:
        self.terminated.set()
        return request  # an Empty, as the reply is

    async def _next(self, context: Any) -> Replica:
        for _ in range(2):
            for may_be_silent in (False, True):
                for replica in itertools.islice(self._turns, len(self._replicas)):
                    if replica.is_up() and (may_be_silent or not self._is_silent(replica.number)):
                        return replica
            # A replica that has just come up may not be connected yet.
            waits = [asyncio.create_task(replica.wait_until_up()) for replica in self._replicas]
            await asyncio.wait(waits, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no replica is up; one is being started")
        raise AssertionError  # not reached: abort raises


def _status(error: grpc.aio.AioRpcError, replica: Replica) -> tuple[grpc.StatusCode, str]:
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return error.code(), f"replica {replica.number} went down with the request in flight"
    return error.code(), str(error.details())


async def balance(
    port: int,
    replicas: Sequence[int],
    watch: Watch | None = None,
    slots: Sequence[range] = (),
) -> None:
    """Serve on a loopback port, once all replicas are up, until a client calls Terminate.

    `replicas`: the port of each. `watch`: on their heartbeats, which are at `slots`. Raises:
    ConfigError if `port` is taken.
    """

    def is_silent(replica: int) -> bool:
        return watch is not None and watch.silence(slots[replica]) > SILENT_S

    async def poll() -> None:
        while watch is not None:
            watch.poll(HEARTBEAT_S)
            await asyncio.sleep(HEARTBEAT_S)

    server = grpc.aio.server(options=SERVER_OPTIONS)
    balancer = Balancer(replicas, is_silent)
    server.add_generic_rpc_handlers((balancer,))
    tasks = [asyncio.create_task(work) for work in (balancer.stay_connected(), poll())]
    try:
        bind(server, port)
        await balancer.wait_until_up()
        await server.start()
        await balancer.terminated.wait()
    finally:
        await server.stop(GRACE_S)
        for task in tasks:
            task.cancel()
