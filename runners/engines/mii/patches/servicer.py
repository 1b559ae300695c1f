"""The gRPC server of a replica: errors have a status, cancelled calls end, loopback only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from mii.constants import LB_MAX_WORKER_THREADS
from mii.grpc_related.modelresponse_server import ModelResponse
from mii.grpc_related.proto import modelresponse_pb2, modelresponse_pb2_grpc
from mii.grpc_related.task_methods import TASK_METHODS_DICT
from pydantic import ValidationError
from typing_extensions import override

from runners.contracts.errors import RequestError, TriptychError
from runners.contracts.validation import problems_of
from runners.engines.mii.deployment.proto import SERVER_OPTIONS, bind, with_tokens
from runners.engines.mii.patches.batching import ResultStream
from runners.engines.mii.patches.requests import NONE

SHUTDOWN_S = 10


class ResponseServicer(ModelResponse):  # type: ignore[misc]  # MII has no types
    """MII's service. A call that ends, however it does, frees what its prompts have."""

    @override
    def GeneratorReply(self, request: Any, context: grpc.ServicerContext) -> Any:
        with _result_streams(self.inference_pipeline, request, context, streaming=False) as streams:
            return modelresponse_pb2.MultiGenerationReply(
                response=[_reply(stream.next()) for stream in streams]
            )

    @override
    def GeneratorReplyStream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _result_streams(self.inference_pipeline, request, context, streaming=True) as (
            stream,
        ):
            finished = False
            while not finished:
                result = stream.next()
                finished = result[4] != NONE
                yield modelresponse_pb2.MultiGenerationReply(response=[_reply(result)])


@contextmanager
def _result_streams(
    pipeline: Any, request: Any, context: grpc.ServicerContext, *, streaming: bool
) -> Iterator[list[ResultStream]]:
    """The result streams of a call's prompts, closed at the end or when the client cancels.

    A call that streams has its first prompt only, as in MII. An exception in the block becomes the
    status of the call.
    """
    task = next(iter(TASK_METHODS_DICT.values()))
    prompts, kwargs = task.unpack_request_from_proto(request)
    kwargs = {**kwargs, "stream": streaming}
    streams: list[ResultStream] = []

    def close() -> None:
        for stream in streams:
            stream.close()

    context.add_callback(close)
    try:
        for prompt in prompts[:1] if streaming else prompts:
            streams.append(pipeline.submit(prompt, dict(kwargs)))
        if not context.is_active():
            close()
        yield streams
    except Exception as error:
        close()
        context.abort(*_status(error))
    finally:
        close()


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status of a failed call. It quotes only messages that are meant for clients."""
    if isinstance(error, RequestError):
        return grpc.StatusCode.INVALID_ARGUMENT, error.message
    if isinstance(error, TriptychError):
        return grpc.StatusCode.INTERNAL, error.message
    if isinstance(error, ValidationError):
        problem = problems_of(error)[0]
        message = f"{problem.field or 'request'}: {problem.requirement}"
        return grpc.StatusCode.INVALID_ARGUMENT, message
    if isinstance(error, ValueError):
        return grpc.StatusCode.INVALID_ARGUMENT, "the request is not valid"
    return grpc.StatusCode.INTERNAL, f"the engine failed: {type(error).__name__}"


def _reply(result: tuple[Any, ...]) -> Any:
    _, text, prompt_tokens, generated_tokens, reason, _, token_ids = result
    return with_tokens(
        modelresponse_pb2.SingleGenerationReply(
            response=text,
            finish_reason=str(reason.value),
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            time_taken=-1,
            model_time_taken=-1,
        ),
        token_ids,
    )


def serve_on_loopback(service_impl: Any, port: int, interceptors: Sequence[Any] = ()) -> None:
    """MII's `_do_serve`, on loopback: serve until a client calls Terminate.

    Raises: ConfigError if the port is taken.
    """
    pool = futures.ThreadPoolExecutor(max_workers=LB_MAX_WORKER_THREADS)
    server = grpc.server(pool, interceptors=tuple(interceptors), options=SERVER_OPTIONS)
    modelresponse_pb2_grpc.add_ModelResponseServicer_to_server(service_impl, server)
    bind(server, port)
    server.start()
    service_impl.get_stop_event().wait()
    server.stop(SHUTDOWN_S)
