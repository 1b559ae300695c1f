"""The program of the rank that forwards requests to a deployment of MII.

MII accepts text and a few parameters (a deployment that was started here accepts seeds and min-p
too). A request with any other parameter is refused; none is dropped silently.
"""

from __future__ import annotations

import asyncio
import functools
import subprocess
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from typing_extensions import override

from runners.config.model import MIITextConfig
from runners.contracts.errors import (
    InvalidRequest,
)
from runners.contracts.text import FinishReason, GenerationRequest, ModelInfo, TextDelta
from runners.engines.mii.deployment.client import as_triptych_error, connect
from runners.engines.mii.deployment.ports import listens
from runners.engines.mii.deployment.proto import tokens_of
from runners.hf.models import (
    SamplingDefaults,
)
from runners.protocol.messages import (
    Abort,
    AbortCall,
    Accepted,
    Detokenize,
    Events,
    HostMessage,
    Submit,
    Tokenize,
    request_failed,
)
from runners.rank.program import Occupancy, RankContext, RankProgram
from runners.text.requests import token_limit
from runners.text.tokenization import PromptTokenizer
from runners.text.tokenizer_pool import TokenizerPool
from runners.text.tokenizer_process import TokenizerProcess

POLL_S = 0.25
LOST_S = 2.0
"""How long a deployment, or all of its replicas, may be unreachable."""
GREEDY_BELOW = 1e-5
"""A lower temperature means greedy decoding, as for the other engines."""
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
"""MII's finish reasons; a result with any other is not the last."""
UNAVAILABLE: dict[str, float | None] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "logprobs": None,
}
"""Parameters that MII lacks, to the value that has no effect."""


@dataclass(frozen=True)
class _Prepared:
    """A request as MII takes it."""

    request_id: str
    text: str
    prompt_tokens: int
    kwargs: dict[str, Any]
    """The fields of MII's `GenerateParamsConfig`."""


class PersistentProgram(RankProgram):
    """Forwards requests to the deployment and ends this rank when the deployment is lost."""

    def __init__(
        self,
        context: RankContext,
        config: MIITextConfig,
        info: ModelInfo,
        tokenizer: PromptTokenizer,
        *,
        defaults: SamplingDefaults,
        address: tuple[str, int],
        supervisor: subprocess.Popen[bytes] | None,
        replicas: Sequence[int],
    ) -> None:
        self._info = info
        self._config = config
        self._tokenizer = tokenizer
        self._tokenizers = TokenizerPool(tokenizer)
        self._defaults = defaults
        self._emit = context.emit
        self._supervisor = supervisor
        self._replicas = replicas
        self._polls_without_replica = 0
        self._loop = asyncio.new_event_loop()
        self._running: dict[str, Future[None]] = {}
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._deployment = asyncio.run_coroutine_threadsafe(connect(*address), self._loop).result()
        self._lost = self._spawn(self._deployment.wait_until_lost(LOST_S))

    @property
    @override
    def info(self) -> ModelInfo:
        return self._info

    @override
    def receive(self, message: HostMessage) -> None:
        match message:
            case Submit(GenerationRequest() as request):
                prepare = functools.partial(self._prepare, request)
                self._tokenizers.prepare(request.request_id, prepare, self._run, self._emit)
            case Abort(request_id):
                self._tokenizers.abort(request_id)
                if (task := self._running.pop(request_id, None)) is not None:
                    task.cancel()
            case Tokenize() | Detokenize():
                self._tokenizers.answer(message, self._emit)
            case AbortCall(call_id):
                self._tokenizers.abort(call_id)
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    @override
    def step(self) -> None:
        # An exception ends this rank, which the host restarts. It is ready again once a replica is
        # up; a deployment that is not detached ends with the rank and is started again too.
        time.sleep(POLL_S)
        if self._supervisor is not None and self._supervisor.poll() is not None:
            raise RuntimeError("the deployment has ended")
        if self._lost.done():
            raise RuntimeError("the deployment cannot be reached")
        is_up = not self._replicas or any(map(listens, self._replicas))
        self._polls_without_replica = 0 if is_up else self._polls_without_replica + 1
        if self._polls_without_replica * POLL_S > LOST_S:
            raise RuntimeError("no replica of the deployment is up")

    @override
    def occupancy(self) -> Occupancy:
        # MII does not report its KV.
        return Occupancy(running=len(self._running), waiting=len(self._tokenizers))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _prepare(self, request: GenerationRequest, tokenizer: TokenizerProcess) -> _Prepared:
        """In a tokenizer thread. Raises: what refuses the request."""
        ids, text = self._prompt(request, tokenizer)
        return _Prepared(request.request_id, text, len(ids), self._kwargs(request, len(ids)))

    def _run(self, prepared: _Prepared) -> None:
        """In a tokenizer thread: run the request."""
        request_id = prepared.request_id
        self._running[request_id] = work = self._spawn(self._generate(prepared))
        work.add_done_callback(lambda _: self._running.pop(request_id, None))

    async def _generate(self, prepared: _Prepared) -> None:
        call, request_id = None, prepared.request_id
        try:
            self._emit(
                Accepted(request_id, prepared.prompt_tokens, prepared.kwargs["max_new_tokens"])
            )
            call = self._deployment.stream(prepared.text, **prepared.kwargs)
            async for reply in call:
                self._emit(Events([await self._delta(request_id, reply.response[0])]))
        except asyncio.CancelledError:
            raise
        except grpc.aio.AioRpcError as error:
            self._emit(request_failed(request_id, as_triptych_error(error)))
        except Exception as error:  # one request's failure must not end the rank
            self._emit(request_failed(request_id, error))
        finally:
            if call is not None:
                call.cancel()

    async def _delta(self, request_id: str, reply: Any) -> TextDelta:
        tokens = tokens_of(reply)
        if tokens is None:  # stock MII sends none
            encode = functools.partial(self._tokenizer.encode, add_special_tokens=False)
            tokens = await asyncio.to_thread(encode, reply.response)
        return TextDelta(
            request_id=request_id,
            text=reply.response,
            token_ids=tokens,
            finish_reason=FINISH_REASONS.get(reply.finish_reason),
        )

    def _prompt(
        self, request: GenerationRequest, tokenizer: TokenizerProcess
    ) -> tuple[list[int], str]:
        """A prompt's tokens, and a text that MII encodes as them.

        Raises: InvalidRequest, ContextLengthExceeded, EngineFailure.
        """
        ids = self._tokenizer.ensure_not_empty(tokenizer.encode(request.prompt))
        if isinstance(request.prompt, str) and request.prompt:
            return ids, request.prompt
        text = tokenizer.decode(ids)
        bos = self._tokenizer.tokenizer.bos_token or ""
        for candidate in (text, text.removeprefix(bos)):
            if tokenizer.encode(candidate) == ids:
                return ids, candidate
        raise InvalidRequest(
            "a persistent MII deployment accepts text only, and the text of these token ids has "
            "other ids: use mii.mode pipeline",
            field="prompt",
        )

    def _kwargs(self, request: GenerationRequest, prompt_tokens: int) -> dict[str, Any]:
        """The fields of MII's `GenerateParamsConfig`.

        Raises: InvalidRequest, ContextLengthExceeded.
        """
        params, defaults = request.sampling, self._defaults
        for name, neutral in UNAVAILABLE.items():
            if getattr(params, name) not in (None, neutral):
                raise InvalidRequest(
                    "is not available from a persistent MII deployment", field=name
                )
        min_new_tokens = int(_resolve(params.min_new_tokens, defaults.min_new_tokens))
        max_new_tokens = token_limit(
            params,
            prompt_tokens,
            max_model_len=self.info.max_model_len,
            min_new_tokens=min_new_tokens,
            default_new_tokens=self._config.max_new_tokens or defaults.max_new_tokens,
        )
        temperature = _resolve(params.temperature, _resolve(defaults.temperature, 0.0))
        ignore_eos = defaults.ignore_eos if params.ignore_eos is None else params.ignore_eos
        kwargs: dict[str, Any] = {
            "max_length": prompt_tokens + max_new_tokens,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "ignore_eos": ignore_eos,
            "do_sample": temperature >= GREEDY_BELOW,
        }
        if temperature >= GREEDY_BELOW:
            top_k = int(_resolve(params.top_k, defaults.top_k))
            min_p = float(_resolve(params.min_p, defaults.min_p))
            kwargs |= {
                "temperature": float(temperature),
                "top_p": max(float(_resolve(params.top_p, defaults.top_p)), 1e-6),
                "top_k": None if top_k == 0 else top_k,
                "min_p": None if min_p == 0.0 else min_p,
                "seed": None if params.seed is None else _signed(params.seed),
            }
        stop = defaults.stop if params.stop is None else params.stop
        if stop:
            kwargs["stop"] = list(stop)
        return kwargs


def _resolve(value: float | None, default: float) -> float:
    return default if value is None else value


def _signed(seed: int) -> int:
    """A seed folded into the signed 64 bits of MII's protocol."""
    return (seed + 2**63) % 2**64 - 2**63
