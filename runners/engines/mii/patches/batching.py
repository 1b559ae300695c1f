"""MII's pipelines, mended.

The scheduler (Dynamic SplitFuse, `generate`, `schedule_requests`) is MII's own. What is replaced:
how tokens are chosen from logits (row by row right, whatever is mixed), what ends a request, what
happens when the KV runs out, what an exception does, and that an idle thread burns a core.
"""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from mii.batching.ragged_batching import MIIAsyncPipeline, MIIPipeline
from mii.config import GenerateParamsConfig
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from transformers import GenerationConfig

from runners.contracts.errors import EngineFailure, InvalidRequest
from runners.contracts.text import SamplingParams
from runners.engines.mii.patches.requests import LENGTH, ExactRequest, Progress
from runners.hf.models import SamplingDefaults, eos_ids
from runners.text.detokenizer import Detokenizer
from runners.text.sampling import SamplerState, sample

IDLE_S = 0.5
EVERY_TOKEN = 2**31


class Mended:
    """What both of MII's pipelines get. Mixed in before them."""

    inference_engine: Any
    tokenizer: Any
    request_queue: queue.Queue[Any]
    result_queues: dict[int, queue.Queue[Any]]
    scheduled_requests: Any
    buffer: Any
    max_length: int

    def __init__(self, *, model_config: Any, **kwargs: Any) -> None:
        if model_config.tensor_parallel == 1:
            # It tells no other rank anything: any free port will do, not one for all pipelines.
            model_config = model_config.model_copy(update={"zmq_port_number": 0})
        super().__init__(model_config=model_config, **kwargs)  # type: ignore[call-arg]
        # Tokens without an entry in the tokenizer are chosen as `generate` chooses them.
        self.vocab_size = EVERY_TOKEN
        self._eos_ids = _end_tokens(model_config.model_name_or_path, self.tokenizer)
        self._most_tokens = _kv_tokens(self.inference_engine)
        if self.is_rank_0 and model_config.tensor_parallel > 1:
            self.__dict__["socket"].wait_for(model_config.tensor_parallel - 1)

    @property
    def local_rank(self) -> int:
        """This rank. DeepSpeed's CPU accelerator says it as a string."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank schedules."""
        return self.local_rank == 0

    def make_request(
        self, tid: int, uid: int, input_tokens: torch.Tensor, kwargs: dict[str, Any]
    ) -> ExactRequest:
        """A request, refused if it can not be served. Raises: ValueError, InvalidRequest."""
        if not len(input_tokens):
            raise InvalidRequest("has no tokens", field="prompt")
        params, seed = _params(kwargs, len(input_tokens), self.max_length)
        prompt = input_tokens.tolist()
        if len(prompt) > self._most_tokens:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, the KV cache holds {self._most_tokens}"
            )
        progress = Progress(
            prompt,
            SamplerState(_sampling(params, seed), SamplingDefaults(), prompt, self._eos_ids),
            Detokenizer(_plain(self.tokenizer), params.stop),
            frozenset() if params.ignore_eos else self._eos_ids,
        )
        return ExactRequest(
            tid=tid,
            uid=uid,
            input_tokens=input_tokens,
            prompt_tokens=input_tokens,
            seq_length=0,
            last_in_prompt=True,
            post_processing=[],
            generate_params=params,
            progress=progress,
        )

    def _enqueue(self, request: ExactRequest) -> None:
        """Have it scheduled; one that may generate nothing is over at once."""
        if request.most > 0:
            self.request_queue.put(request)
            return
        request._known.ended = LENGTH
        self._generate_output(request)

    def _process_logits(
        self, next_token_logits: torch.Tensor, running_requests: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each row that is the last of its prompt; the others' are never looked at."""
        rows = [i for i, r in enumerate(running_requests) if r.last_in_prompt]
        tokens = torch.zeros(len(next_token_logits), dtype=torch.int64)
        if rows:
            states = [running_requests.requests[i].progress.sampler for i in rows]
            chosen, _ = sample(next_token_logits[rows].float().cpu(), states)
            tokens[rows] = torch.tensor(chosen)
        return tokens, torch.zeros(len(tokens), dtype=torch.bool)

    def _generate_output(self, r: ExactRequest) -> None:
        """Hand out what a request has that was not: (uid, text, prompt tokens, generated tokens,
        reason, stream, token ids)."""
        known = r._known
        text, known.text = known.text, ""
        tokens, known.unsent = known.unsent, []
        first = len(tokens) == len(known.tokens)
        if r.return_full_text and first:
            text = _plain(self.tokenizer).decode(known.prompt, skip_special_tokens=True) + text
        self.result_queues[r.tid].put_nowait(
            (r.uid, text, len(known.prompt), len(known.tokens), known.ended, r.stream, tokens)
        )

    def reset_request_status(self) -> None:
        """The KV ran out: the youngest request that has any gives it back and is computed anew
        from all it has, its generated tokens included."""
        holders = [r for r in self.buffer if r.seq_length > 0]
        if not holders:
            return  # those that just ended hold it, and are about to give it back
        victim = holders[-1]
        known = victim.progress
        self.buffer = type(self.buffer)(r for r in self.buffer if r.uid != victim.uid)
        self.scheduled_requests.append(_flush(victim.uid))
        tokens = torch.tensor(known.prompt + known.tokens, dtype=victim.prompt_tokens.dtype)
        if len(tokens) > self._most_tokens:
            known.ended = LENGTH
            known.finish()
            self._generate_output(victim)
            return
        again = copy.copy(victim)
        again.prompt_tokens = again.input_tokens = tokens
        again.seq_length, again.last_in_prompt = 0, True
        self.buffer.append(again)

    def drop(self, uids: Iterable[int]) -> None:
        """Forget requests, wherever they are, and have their KV given back. Of the thread that
        schedules only."""
        gone = set(uids)
        waiting = []
        while not self.request_queue.empty():
            waiting.append(self.request_queue.get_nowait())
        for request in waiting:
            if request.uid not in gone or request.is_flush_request:
                self.request_queue.put(request)
        self.buffer = type(self.buffer)(
            r for r in self.buffer if r.uid not in gone or r.is_flush_request
        )
        self.scheduled_requests.requests = [
            r for r in self.scheduled_requests if r.uid not in gone or r.is_flush_request
        ]
        for uid in gone:
            self.request_queue.put(_flush(uid))


class MendedPipeline(Mended, MIIPipeline):  # type: ignore[misc]  # MII carries no types
    """`mii.pipeline`'s. An exception leaves it as it was before the call."""

    def __call__(self, prompts: str | list[str], **generate_kwargs: Any) -> Any:
        """Generate for all prompts together."""
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

    def _put_request(self, uid: int, prompt: str, kwargs: dict[str, Any]) -> None:
        if self.is_rank_0:
            request = self.make_request(self.tid, uid, self.tokenizer.encode(prompt), kwargs)
            self._enqueue(request)

    def _get_response(self) -> tuple[int, Any]:
        uid, text, *rest = self.result_queues[self.tid].get()[:5]
        return uid, self.make_response(text, *rest)


class MendedAsyncPipeline(Mended, MIIAsyncPipeline):  # type: ignore[misc]  # as above
    """A server's. Every request ends: with an answer, an error, or because nobody waits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cancelled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}

    def __call__(self) -> None:
        """The scheduler's thread: rank 0 until `shutdown`, the others until rank 0 ends."""
        get_accelerator().set_device(self.local_rank)
        if not self.is_rank_0:
            while not self.generate():
                pass
            return
        while not self.stop_thread:
            try:
                self._drop_cancelled()
                self._wait_for_work()
                self.generate()
            except Exception as error:  # whatever it is, nobody may be left waiting
                self._fail_all(error)
        self._fail_all(EngineFailure("the deployment is shutting down"))
        self._bcast_requests(force=True)

    def submit(self, prompt: str, kwargs: dict[str, Any]) -> Answer:
        """Begin to generate. Raises: ValueError for what can not be served."""
        if self.stop_thread:
            raise EngineFailure("the deployment is shutting down")
        uid = self._get_uid()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        try:
            # Results are filed by what MII takes for the id of the waiting thread.
            request = self.make_request(uid, uid, self.tokenizer.encode(prompt), kwargs)
        except BaseException:
            self.uids.discard(uid)
            raise
        self.result_queues[uid] = answers  # type: ignore[assignment]
        self._enqueue(request)
        return Answer(answers, lambda: self._cancelled.put(uid))

    def _wait_for_work(self) -> None:
        """Sleep while there is nothing to schedule."""
        if self.scheduled_requests or self.buffer:
            return
        arrived = self.request_queue.not_empty
        with arrived:
            arrived.wait_for(
                lambda: self.request_queue._qsize() or not self._cancelled.empty(), IDLE_S
            )

    def _drop_cancelled(self) -> None:
        gone = set()
        while not self._cancelled.empty():
            gone.add(self._cancelled.get())
        if gone:
            self.drop(gone)
            self._forget(gone)

    def _fail_all(self, error: Exception) -> None:
        # Not only those that MII still has in a list: it may have failed between two of them.
        pending = list(self.result_queues.items())
        self.drop(uid for uid, _ in pending)
        for _, answers in pending:
            answers.put(error)

    def _forget(self, uids: Iterable[int]) -> None:
        for uid in uids:
            self.result_queues.pop(uid, None)
            self.uids.discard(uid)


class Answer:
    """What one request generates. Close it once done with, or to abort it."""

    def __init__(self, answers: queue.SimpleQueue[Any], close: Callable[[], None]) -> None:
        self._answers = answers
        self._close = close
        self._lock = threading.Lock()
        self._closed = False

    def next(self) -> Any:
        """The next result. Raises: what ended the request instead."""
        result = self._answers.get()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Give everything of it back, and wake who waits for it. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close()
                self._answers.put(EngineFailure("nobody waits for this request any more"))


def _flush(uid: int) -> ExactRequest:
    """MII's way of saying that a sequence's KV is given back."""
    return ExactRequest(None, uid, None, None, None, None, None, None)


class _Numbers(BaseModel):
    """What MII computes with before it validates, or never validates."""

    max_length: PositiveInt = 1
    max_new_tokens: NonNegativeInt = 0
    min_new_tokens: NonNegativeInt = 0
    seed: int = 0


def _params(
    kwargs: dict[str, Any], prompt_length: int, longest: int
) -> tuple[GenerateParamsConfig, int | None]:
    """Raises: ValueError (which pydantic's is) that names the field."""
    given = {k: v for k, v in kwargs.items() if v is not None}
    given |= _Numbers(**given).model_dump(exclude_unset=True)
    seed = given.pop("seed", None)
    if isinstance(stop := given.get("stop"), dict):  # how a list crosses MII's wire
        given["stop"] = [stop[key] for key in sorted(stop, key=int)]
    given["prompt_length"] = prompt_length
    given["max_length"] = min(given.get("max_length", longest), longest)
    return GenerateParamsConfig(**given), seed


def _sampling(params: GenerateParamsConfig, seed: int | None) -> SamplingParams:
    if not params.do_sample:
        return SamplingParams(temperature=0.0, min_new_tokens=params.min_new_tokens)
    return SamplingParams(
        temperature=1.0 if params.temperature is None else params.temperature,
        top_p=params.top_p,
        top_k=params.top_k or 0,
        min_new_tokens=params.min_new_tokens,
        seed=seed,
    )


def _plain(tokenizer: Any) -> Any:
    """The Hugging Face tokenizer in MII's wrapper."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _end_tokens(path: str, tokenizer: Any) -> frozenset[int]:
    """As `generate` has them, else the tokenizer's, which is all that MII looks at."""
    tokenizer = _plain(tokenizer)
    if (Path(path) / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(path)
        if found := eos_ids(own, len(tokenizer)):
            return found
    eos = tokenizer.eos_token_id
    return frozenset([] if eos is None else [eos])


def _kv_tokens(engine: Any) -> int:
    """Tokens that the KV of an engine without sequences holds."""
    total = getattr(engine, "total_tokens", None)
    if total is not None:
        return int(total)
    return int(min(engine.free_blocks)) * int(engine.model().kv_block_size)
