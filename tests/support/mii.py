"""MII's gRPC server over one pipeline, patched or stock, in this process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import mii.api
from mii.batching import ragged_batching
from mii.config import ModelConfig
from mii.grpc_related import modelresponse_server
from mii.grpc_related.proto import modelresponse_pb2_grpc

import runners.engines.mii.patches
from runners.engines.mii.deployment.ports import free_port
from runners.engines.mii.deployment.proto import request
from runners.engines.mii.patches.apply import ORIGINALS
from runners.engines.mii.patches.loading import load_cpu_engine

assert runners.engines.mii.patches

TIMEOUT = 30.0


def model_config(
    folder: Path, *, kv_blocks: int = 8, step: int = 768, zmq_port: int | None = None
) -> Any:
    """MII's config of a model with `kv_blocks` blocks of 128 tokens and `step` tokens a step."""
    manager = {
        "max_ragged_batch_size": step,
        "max_ragged_sequence_count": 8,
        "memory_config": {"mode": "allocate", "size": kv_blocks},
    }
    return ModelConfig(
        model_name_or_path=str(folder),
        tensor_parallel=1,
        zmq_port_number=zmq_port or free_port(),
        inference_engine_config={"state_manager": manager},
    )


def pipeline(folder: Path, *, stock: bool = False, **limits: int) -> Any:
    """An asynchronous pipeline, stock MII's or the patched one, over the same engine."""
    config = model_config(folder, **limits)
    if not stock:
        return mii.api.async_pipeline(config)
    return ragged_batching.MIIAsyncPipeline(
        load_cpu_engine(config), mii.api.load_tokenizer(config), config
    )


class Served:
    """A client of the server of a pipeline. A call that hangs fails with DEADLINE_EXCEEDED."""

    def __init__(self, pipeline: Any, channel: grpc.Channel) -> None:
        self.pipeline = pipeline
        self._stub = modelresponse_pb2_grpc.ModelResponseStub(channel)

    def ask(self, *prompts: str, **kwargs: Any) -> list[Any]:
        """The answers to prompts."""
        return list(self._stub.GeneratorReply(request(prompts, kwargs), timeout=TIMEOUT).response)

    def stream(self, prompt: str, **kwargs: Any) -> Any:
        """A call that yields answers."""
        kwargs = kwargs | {"stream": True}
        return self._stub.GeneratorReplyStream(request([prompt], kwargs), timeout=TIMEOUT)

    def streamed(self, prompt: str, **kwargs: Any) -> str:
        """A streamed answer's text."""
        return "".join(each.response[0].response for each in self.stream(prompt, **kwargs))

    def together(self, *calls: Any) -> list[Any]:
        """The results of calls made at the same time."""
        gate = threading.Barrier(len(calls))

        def run(call: Any) -> Any:
            gate.wait()
            return call()

        with futures.ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(run, calls))


@contextmanager
def served(folder: Path, *, stock: bool = False, **limits: int) -> Iterator[Served]:
    """A pipeline behind MII's gRPC service."""
    async_pipeline = pipeline(folder, stock=stock, **limits)
    async_pipeline.start()
    service = ORIGINALS["ModelResponse"][0] if stock else modelresponse_server.ModelResponse
    server = grpc.server(futures.ThreadPoolExecutor(16))
    modelresponse_pb2_grpc.add_ModelResponseServicer_to_server(
        service(async_pipeline=async_pipeline), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(async_pipeline, channel)
    finally:
        async_pipeline.stop_thread = True
        if stock:  # its threads would wait for ever, and the process for its threads
            async_pipeline.generate = sys.exit
            for answers in list(async_pipeline.result_queues.values()):
                answers.put(())
        async_pipeline.thread.join(5)
        server.stop(0).wait()
        async_pipeline.socket.close(linger=0)
        async_pipeline._zmq_context.destroy(linger=0)
