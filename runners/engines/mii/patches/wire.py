"""A replica's gRPC server, mended: errors with a status, loopback only, cancelling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc
from mii.constants import LB_MAX_WORKER_THREADS
from mii.grpc_related.modelresponse_server import ModelResponse
from mii.grpc_related.proto import modelresponse_pb2, modelresponse_pb2_grpc
from mii.grpc_related.task_methods import TASK_METHODS_DICT
from pydantic import ValidationError

from runners.contracts.errors import RequestError, TriptychError
from runners.contracts.validation import problems_of
from runners.engines.mii.deployment.proto import SERVER_OPTIONS, bind, with_tokens
from runners.engines.mii.patches.requests import NONE

SHUTDOWN_S = 10


class Replies(ModelResponse):  # type: ignore[misc]  # MII carries no types
    """A replica's answers. Whoever leaves gives everything back; whatever fails says why."""

    def GeneratorReply(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """All prompts' answers, in their order."""
        with _Answers(self.inference_pipeline, request, context) as answers:
            return modelresponse_pb2.MultiGenerationReply(
                response=[_reply(answer.next()) for answer in answers]
            )

    def GeneratorReplyStream(  # noqa: N802
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """The first prompt's answer as it grows, a message per token."""
        with _Answers(self.inference_pipeline, request, context, stream=True) as answers:
            ended = False
            while not ended:
                result = answers[0].next()
                ended = result[4] != NONE
                yield modelresponse_pb2.MultiGenerationReply(response=[_reply(result)])


class _Answers:
    """The answers to one call, as a context: closed afterwards, or when the client leaves."""

    def __init__(
        self, pipeline: Any, request: Any, context: grpc.ServicerContext, *, stream: bool = False
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._context = context
        self._stream = stream
        self._answers: list[Any] = []

    def __enter__(self) -> list[Any]:
        task = next(iter(TASK_METHODS_DICT.values()))
        prompts, kwargs = task.unpack_request_from_proto(self._request)
        kwargs = {**kwargs, "stream": self._stream}
        self._context.add_callback(self._close)
        try:
            for prompt in prompts[:1] if self._stream else prompts:
                self._answers.append(self._pipeline.submit(prompt, dict(kwargs)))
        except Exception as error:
            self.__exit__(type(error), error)
        if not self._context.is_active():
            self._close()
        return self._answers

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self._close()
        if isinstance(error, Exception):
            self._context.abort(*_status(error))

    def _close(self) -> None:
        for answer in self._answers:
            answer.close()


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """What the client is told. Only what is meant for it is quoted."""
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
    """`_do_serve`, for this machine only: until the service is told to stop.

    Raises: ConfigError if the port is taken.
    """
    pool = futures.ThreadPoolExecutor(max_workers=LB_MAX_WORKER_THREADS)
    server = grpc.server(pool, interceptors=tuple(interceptors), options=SERVER_OPTIONS)
    modelresponse_pb2_grpc.add_ModelResponseServicer_to_server(service_impl, server)
    bind(server, port)
    server.start()
    service_impl.get_stop_event().wait()
    server.stop(SHUTDOWN_S)
