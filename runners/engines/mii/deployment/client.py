"""The client of a deployment, on `grpc.aio`; the deployment may be stock MII's.

Used by the rank of mode `persistent` and by the REST gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from runners.contracts.errors import (
    ConfigError,
    EngineFailure,
    InvalidRequest,
    RunnerUnavailable,
    TriptychError,
)
from runners.engines.mii.deployment.proto import OPTIONS, SERVICE, messages, request

CONNECT_S = 30.0


class Deployment:
    """A connection to the load balancer of a deployment, for use in one event loop."""

    def __init__(self, host: str, port: int) -> None:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        types = messages()
        self._unary = self._channel.unary_unary(
            SERVICE + "GeneratorReply",
            request_serializer=types.MultiStringRequest.SerializeToString,
            response_deserializer=types.MultiGenerationReply.FromString,
        )
        self._stream = self._channel.unary_stream(
            SERVICE + "GeneratorReplyStream",
            request_serializer=types.MultiStringRequest.SerializeToString,
            response_deserializer=types.MultiGenerationReply.FromString,
        )

    async def connect(self) -> None:
        """Wait until the connection is up."""
        await self._channel.channel_ready()

    async def wait_until_lost(self, patience_s: float) -> None:
        """Return once the connection has been down for `patience_s` seconds."""
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(patience_s):
                    await self.connect()
                await self._channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

    def generate(self, prompts: Sequence[str], **kwargs: Any) -> Any:
        """A call, to be awaited, whose result is the `MultiGenerationReply` of all prompts.

        Raises: TypeError for an argument that cannot be sent to MII.
        """
        return self._unary(request(prompts, kwargs))

    def stream(self, prompt: str, **kwargs: Any) -> Any:
        """A call that yields `MultiGenerationReply`s of one reply each; `cancel()` aborts it."""
        return self._stream(request([prompt], {**kwargs, "stream": True}))

    async def close(self) -> None:
        """Close the connection and abort its calls."""
        await self._channel.close()


async def connect(host: str, port: int) -> Deployment:
    """A connection for use in the current event loop.

    Raises: ConfigError if no deployment answers within `CONNECT_S` seconds.
    """
    deployment = Deployment(host, port)
    try:
        async with asyncio.timeout(CONNECT_S):
            await deployment.connect()
    except TimeoutError:
        raise ConfigError(f"{host}:{port} is not a deployment of MII") from None
    return deployment


def as_triptych_error(error: grpc.aio.AioRpcError) -> TriptychError:
    """What a failed call means for its request."""
    detail = str(error.details())
    if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(f"MII refused this request: {detail}")
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return RunnerUnavailable(f"the MII deployment: {detail}")
    return EngineFailure(f"the MII deployment failed on this request: {detail}")
