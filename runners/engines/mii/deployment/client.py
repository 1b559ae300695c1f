"""A deployment as a client sees it, on `grpc.aio`: ours, or one that stock MII stood up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from runners.engines.mii.deployment.proto import OPTIONS, SERVICE, messages, request


class Deployment:
    """The load balancer of a deployment. All methods belong to one event loop."""

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
        """Until somebody answers."""
        await self._channel.channel_ready()

    async def lost(self, patience_s: float) -> None:
        """Until nobody has answered for so long."""
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(patience_s):
                    await self.connect()
                await self._channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

    def generate(self, prompts: Sequence[str], **kwargs: Any) -> Any:
        """A call that gives a `MultiGenerationReply` of all prompts. Raises: TypeError."""
        return self._unary(request(prompts, kwargs))

    def stream(self, prompt: str, **kwargs: Any) -> Any:
        """A call that yields `MultiGenerationReply`s, each of one message; `cancel()` aborts it."""
        return self._stream(request([prompt], {**kwargs, "stream": True}))

    async def close(self) -> None:
        """Abort what runs."""
        await self._channel.close()
