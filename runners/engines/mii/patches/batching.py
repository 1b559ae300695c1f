"""MII's pipelines, patched.

The scheduler (Dynamic SplitFuse: `generate`, `schedule_requests`) is MII's own. Replaced are
sampling (per row, whatever other requests are in the batch), the end of requests, the freeing of
KV, the handling of exceptions, and the idle loop, which took a whole core.
"""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from deepspeed.accelerator import get_accelerator
from mii.batching.ragged_batching import MIIAsyncPipeline, MIIPipeline, RaggedBatchBase
from mii.config import GenerateParamsConfig
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from typing_extensions import override

from runners.contracts.errors import EngineFailure, InvalidRequest
from runners.contracts.text import SamplingParams
from runners.engines.mii.defaults import load_generation_config
from runners.engines.mii.patches.requests import LENGTH, RequestState, TrackedRequest
from runners.hf.models import SamplingDefaults, end_token_ids
from runners.rank.program import StepClock
from runners.text.detokenizer import Detokenizer
from runners.text.sampling import SamplerState, sample

IDLE_S = 0.5
UNLIMITED_VOCAB = 2**31


class PatchedBatching(RaggedBatchBase):  # type: ignore[misc]  # MII has no types
    """What both of MII's pipelines have in common: their other base class comes after this one."""

    buffer: Any

    def __init__(self, *, model_config: Any, **kwargs: Any) -> None:
        if model_config.tensor_parallel == 1:
            # There is no other rank to send to: any free port serves. MII has one for all.
            model_config = model_config.model_copy(update={"zmq_port_number": 0})
        super().__init__(model_config=model_config, **kwargs)
        # `generate` may also sample tokens that the model has and the tokenizer lacks.
        self.vocab_size = UNLIMITED_VOCAB
        tokenizer = _hf_tokenizer(self.tokenizer)
        generation = load_generation_config(Path(model_config.model_name_or_path))
        self._eos_ids = end_token_ids(generation, tokenizer, len(tokenizer))
        self._kv_tokens = _kv_tokens(self.inference_engine)
        if self.is_rank_0 and model_config.tensor_parallel > 1:
            self.socket.wait_for(model_config.tensor_parallel - 1)

    @property
    @override
    def local_rank(self) -> int:
        # DeepSpeed's accelerator for CPUs returns a string.
        return int(os.environ.get("LOCAL_RANK", "0"))

    @override
    def make_request(
        self, tid: int, uid: int, input_tokens: torch.Tensor, kwargs: dict[str, Any]
    ) -> TrackedRequest:
        if not len(input_tokens):
            raise InvalidRequest("has no tokens", field="prompt")
        params, additions = _params(kwargs, len(input_tokens), self.max_length)
        prompt = input_tokens.tolist()
        if len(prompt) > self._kv_tokens:
            raise InvalidRequest(
                f"has {len(prompt)} tokens, but the KV cache has room for {self._kv_tokens}",
                field="prompt",
            )
        state = RequestState(
            prompt,
            SamplerState(_sampling(params, additions), SamplingDefaults(), prompt, self._eos_ids),
            Detokenizer(_hf_tokenizer(self.tokenizer), params.stop),
            frozenset() if params.ignore_eos else self._eos_ids,
        )
        return TrackedRequest(
            tid=tid,
            uid=uid,
            input_tokens=input_tokens,
            prompt_tokens=input_tokens,
            seq_length=0,
            last_in_prompt=True,
            post_processing=[],
            generate_params=params,
            state=state,
        )

    def _enqueue(self, request: TrackedRequest) -> None:
        """Give a request to the scheduler, unless it may not generate any token."""
        if request.max_tokens > 0:
            self.request_queue.put(request)
            return
        request.generation.finish(LENGTH)
        self._generate_output(request)

    @override
    def _process_logits(
        self, next_token_logits: torch.Tensor, running_requests: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # MII ignores the tokens of rows that do not end a prompt.
        rows = [i for i, r in enumerate(running_requests) if r.last_in_prompt]
        tokens = torch.zeros(len(next_token_logits), dtype=torch.int64)
        if rows:
            states = [running_requests.requests[i].generation.sampler for i in rows]
            sampled, _ = sample(next_token_logits[rows].float().cpu(), states)
            tokens[rows] = torch.tensor(sampled)
        return tokens, torch.zeros(len(tokens), dtype=torch.bool)

    @override
    def _generate_output(self, r: TrackedRequest) -> None:
        # A result holds what was generated since the last one: MII's six fields, and the token ids.
        state = r.generation
        text, state.unsent_text = state.unsent_text, ""
        tokens, state.unsent_tokens = state.unsent_tokens, []
        is_first = len(tokens) == len(state.tokens)
        if r.return_full_text and is_first:
            tokenizer = _hf_tokenizer(self.tokenizer)
            text = tokenizer.decode(state.prompt, skip_special_tokens=True) + text
        counts = len(state.prompt), len(state.tokens)
        self.result_queues[r.tid].put_nowait(
            (r.uid, text, *counts, state.finish_reason, r.stream, tokens)
        )

    @override
    def reset_request_status(self) -> None:
        # There is no KV for any request: the last one frees its own, and is computed again from its
        # prompt and its generated tokens.
        candidates = [r for r in self.buffer if r.seq_length > 0]
        if not candidates:
            return  # requests that have just ended free theirs in the next step
        victim = candidates[-1]
        state = victim.generation
        self.buffer = type(self.buffer)(r for r in self.buffer if r.uid != victim.uid)
        self.scheduled_requests.append(_flush_request(victim.uid))
        tokens = torch.tensor(state.prompt + state.tokens, dtype=victim.prompt_tokens.dtype)
        if len(tokens) > self._kv_tokens:
            state.finish(LENGTH)
            self._generate_output(victim)
            return
        restarted = copy.copy(victim)
        restarted.prompt_tokens = restarted.input_tokens = tokens
        restarted.seq_length, restarted.last_in_prompt = 0, True
        self.buffer.append(restarted)

    def drop(self, uids: Iterable[int]) -> None:
        """Remove requests from all queues and free their KV. For the scheduler's thread only."""
        dropped = set(uids)

        def stays(request: Any) -> bool:
            return request.uid not in dropped or request.is_flush_request

        queued = []
        while not self.request_queue.empty():
            queued.append(self.request_queue.get_nowait())
        self.buffer = type(self.buffer)(filter(stays, self.buffer))
        self.scheduled_requests.requests = list(filter(stays, self.scheduled_requests))
        for request in (*filter(stays, queued), *map(_flush_request, dropped)):
            self.request_queue.put(request)


class PatchedPipeline(PatchedBatching, MIIPipeline):  # type: ignore[misc]  # as above
    """`mii.pipeline`'s. An exception leaves the pipeline as it was before the call."""

    @override
    def __call__(self, prompts: str | list[str], **generate_kwargs: Any) -> Any:
        count = 1 if isinstance(prompts, str) else len(prompts)
        self.result_queues[self.tid] = queue.Queue()
        try:
            return super().__call__(prompts, **generate_kwargs)
        except BaseException:
            if self.is_rank_0 and not self._destroyed:
                self.drop(range(count))
                self.schedule_requests()
                self._bcast_requests(force=True)
                self.flush(self.scheduled_requests.requests_to_flush.uids)
                self.scheduled_requests.requests = []
            raise

    @override
    def _put_request(self, uid: int, prompt: str, kwargs: dict[str, Any]) -> None:
        if self.is_rank_0:
            request = self.make_request(self.tid, uid, self.tokenizer.encode(prompt), kwargs)
            self._enqueue(request)

    @override
    def _get_response(self) -> tuple[int, Any]:
        uid, text, *rest = self.result_queues[self.tid].get()[:5]
        return uid, self.make_response(text, *rest)


class PatchedAsyncPipeline(PatchedBatching, MIIAsyncPipeline):  # type: ignore[misc]  # as above
    """A deployment's. Every request ends, with its last result or with an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cancelled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.step_clock = StepClock()

    @override
    def __call__(self) -> None:
        # The scheduler's thread: on rank 0 until `shutdown`, on the others until rank 0 ends.
        get_accelerator().set_device(self.local_rank)
        if not self.is_rank_0:
            while not self.generate():
                pass
            return
        while not self.stop_thread:
            try:
                self._drop_cancelled()
                self._wait_for_work()
                with self.step_clock:
                    self.generate()
            except Exception as error:  # whatever it is, no client may be left waiting
                self._fail_all(error)
        self._fail_all(EngineFailure("the deployment is shutting down"))
        self._bcast_requests(force=True)

    def submit(self, prompt: str, kwargs: dict[str, Any]) -> ResultStream:
        """Start to generate. Raises: ValueError, TriptychError for what cannot be served."""
        if self.stop_thread:
            raise EngineFailure("the deployment is shutting down")
        uid = self._get_uid()
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        try:
            # MII files results by thread (`tid`); here each request has a queue.
            request = self.make_request(uid, uid, self.tokenizer.encode(prompt), kwargs)
        except BaseException:
            self.uids.discard(uid)
            raise
        self.result_queues[uid] = results
        self._enqueue(request)
        return ResultStream(results, lambda: self._cancelled.put(uid))

    def _wait_for_work(self) -> None:
        """Sleep until there is something to schedule, or `IDLE_S` at most."""
        if self.scheduled_requests or self.buffer:
            return
        not_empty = self.request_queue.not_empty
        with not_empty:
            not_empty.wait_for(
                lambda: self.request_queue._qsize() or not self._cancelled.empty(), IDLE_S
            )

    def _drop_cancelled(self) -> None:
        cancelled = set()
        while not self._cancelled.empty():
            cancelled.add(self._cancelled.get())
        if cancelled:
            self.drop(cancelled)
        for uid in cancelled:
            self.result_queues.pop(uid, None)
            self.uids.discard(uid)

    def _fail_all(self, error: Exception) -> None:
        # MII may have failed while a request was in none of its queues; result queues have all.
        pending = list(self.result_queues.items())
        self.drop(uid for uid, _ in pending)
        for _, results in pending:
            results.put(error)


class ResultStream:
    """The results of one request, to be closed in the end, which aborts it if it still runs."""

    def __init__(self, results: queue.SimpleQueue[Any], cancel: Callable[[], None]) -> None:
        self._results = results
        self._cancel = cancel
        self._lock = threading.Lock()
        self._closed = False

    def next(self) -> Any:
        """The next result; raises what the request failed with.

        A result is (uid, text, prompt tokens, generated tokens, finish reason, stream, token ids).
        """
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Free all that the request has and wake a waiting `next`; any thread may, repeatedly."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._cancel()
                self._results.put(EngineFailure("the request was cancelled"))


def _flush_request(uid: int) -> TrackedRequest:
    """MII's message that the KV of a sequence is freed."""
    return TrackedRequest(None, uid, None, None, None, None, None, None)


class _NumericParams(BaseModel):
    """Parameters that MII computes with before it validates them, or does not validate."""

    max_length: PositiveInt = 1
    max_new_tokens: NonNegativeInt = 0
    min_new_tokens: NonNegativeInt = 0


class _Additions(BaseModel):
    """Parameters of sampling that MII lacks."""

    seed: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None


def _params(
    kwargs: dict[str, Any], prompt_tokens: int, longest: int
) -> tuple[GenerateParamsConfig, _Additions]:
    """MII's parameters, and those that it lacks.

    Raises: ValueError that names the field, as pydantic's ValidationError does.
    """
    values = {k: v for k, v in kwargs.items() if v is not None}
    values |= _NumericParams(**values).model_dump(exclude_unset=True)
    additions = _Additions(
        **{name: values.pop(name) for name in _Additions.model_fields if name in values}
    )
    if isinstance(stop := values.get("stop"), dict):  # a list, as `proto` sends it
        values["stop"] = [stop[key] for key in sorted(stop, key=int)]
    values["prompt_length"] = prompt_tokens
    values["max_length"] = min(values.get("max_length", longest), longest)
    return GenerateParamsConfig(**values), additions


def _sampling(params: GenerateParamsConfig, additions: _Additions) -> SamplingParams:
    if not params.do_sample:
        return SamplingParams(temperature=0.0, min_new_tokens=params.min_new_tokens)
    return SamplingParams(
        temperature=1.0 if params.temperature is None else params.temperature,
        top_p=params.top_p,
        top_k=0 if params.top_k is None else params.top_k,
        min_p=additions.min_p,
        min_new_tokens=params.min_new_tokens,
        seed=additions.seed,
    )


def _hf_tokenizer(tokenizer: Any) -> Any:
    """The Hugging Face tokenizer in MII's wrapper."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _kv_tokens(engine: Any) -> int:
    """Tokens for which an engine without sequences has KV."""
    total = getattr(engine, "total_tokens", None)
    if total is not None:
        return int(total)
    return int(min(engine.free_blocks)) * int(engine.model().kv_block_size)
