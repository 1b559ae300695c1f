"""The scheduler: decides what each step computes, and turns its logits into text deltas.

`program` calls it in rank 0. Sequences join and leave the batch between steps. A step computes one
token of every decoding sequence and fills the rest of its budget with chunks of prompts (Dynamic
SplitFuse, as in DeepSpeed-FastGen, arXiv:2401.08671), so that a long prompt never stalls running
streams. A sequence is admitted once its prompt fits the free KV. If a running sequence needs a
block and none is free, the youngest is preempted: it loses its KV, waits, and is recomputed from
its tokens (as in vLLM).

On an engine that overlaps, a step is submitted before the tokens of the step before are known: what
that step sampled is a `PENDING` token. A sequence that turns out to have ended, or was aborted or
preempted, has then computed one token too many, which is discarded.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from runners.contracts.errors import EngineFailure
from runners.contracts.text import FinishReason, TextDelta, TokenLogprob
from runners.text.detokenizer import Detokenizer
from runners.text.engine import Engine, PendingStep, Row
from runners.text.paging.blocks import BLOCK_SIZE, PENDING
from runners.text.prefill_budget import PrefillBudget
from runners.text.sampling import RankedToken, SamplerState

logger = logging.getLogger("triptych.text")


@dataclass(eq=False)
class Sequence:
    """The prompt of one request, and the tokens generated for it so far."""

    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int
    eos_ids: frozenset[int]
    """Tokens that end it; empty under ignore_eos."""
    sampler: SamplerState
    detokenizer: Detokenizer
    uid: int = field(default=-1, init=False)
    """Its id in the engine, a new one at each admission; -1 before the first."""
    output_ids: list[int] = field(default_factory=list, init=False)
    pending: bool = field(default=False, init=False)
    """Whether a step that was submitted samples its next token."""
    num_computed: int = field(default=0, init=False)
    """Tokens whose KV exists: all except the last while it decodes, fewer during prefill."""

    @property
    def num_output(self) -> int:
        """Number of output tokens, the pending one included."""
        return len(self.output_ids) + self.pending

    @property
    def length(self) -> int:
        """Number of its tokens, prompt and output, the pending one included."""
        return len(self.prompt_ids) + len(self.output_ids) + self.pending

    @property
    def decoding(self) -> bool:
        """Whether only its newest token is to be computed."""
        return self.length - self.num_computed == 1 and self.num_computed > 0

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output tokens."""
        return self.prompt_ids + self.output_ids + [PENDING] * self.pending

    def next_tokens(self, count: int) -> list[int]:
        """The first `count` tokens of those that are still to be computed."""
        if self.decoding and self.num_output:
            return [PENDING if self.pending else self.output_ids[-1]]
        return self.token_ids[self.num_computed : self.num_computed + count]

    def leave(self) -> None:
        """Forget what the engine computed of it; a pending token is discarded."""
        self.uid = -1
        self.pending = False
        self.num_computed = 0


@dataclass(frozen=True)
class Limits:
    """Bounds of a step, in sequences and tokens."""

    max_batch_size: int
    max_step_tokens: int


Schedule = list[tuple[Sequence, list[int]]]
"""The sequences of a step, each with the tokens that the step computes."""


@dataclass(frozen=True)
class _Submitted:
    """A step whose tokens were not fetched yet."""

    step: PendingStep
    sampled: list[tuple[Sequence, int]]
    """The sequences whose next tokens it samples, each with its uid then."""
    decoding: int
    prompt_tokens: int
    time: float
    """When it was submitted."""


class Scheduler:
    """Runs sequences on an engine. All calls come from one thread.

    `emit` gets the deltas of each step, `fail` the error of a request that ends with one;
    `describe` gives the text and the bytes of a token.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        *,
        emit: Callable[[list[TextDelta]], None],
        fail: Callable[[str, Exception], None],
        describe: Callable[[int], tuple[str, bytes]],
    ) -> None:
        self.limits = limits
        self._engine = engine
        self._emit = emit
        self._fail = fail
        self._describe = describe
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._uids = itertools.count()
        self._prefill_budget = PrefillBudget()
        self._submitted: _Submitted | None = None
        self._last_end = 0.0
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits, or a step was submitted."""
        return bool(self._waiting or self._running or self._submitted)

    @property
    def running(self) -> int:
        """Number of admitted sequences."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of sequences that are not admitted."""
        return len(self._waiting)

    @property
    def kv_used(self) -> int:
        """Tokens of KV in use, in whole blocks."""
        return self._engine.total_tokens - self._engine.free_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The KV cache must be large enough for it alone."""
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Remove a sequence and free its KV. Unknown ids are ignored."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.request_id == request_id:
                self._remove(sequence)

    def step(self) -> None:
        """Submit a step, and emit what was sampled in the step before, or where the engine does not
        overlap, in this one."""
        schedule = self._schedule()
        before, self._submitted = self._submitted, None
        failure = None
        try:
            if schedule:
                self._submitted = self._submit(schedule)
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # its frames keep tensors
        if before is not None:
            self._postprocess(before)
        if failure is not None:
            self._shed(schedule, failure)
        if self._submitted is not None and not self._engine.overlaps:
            submitted, self._submitted = self._submitted, None
            self._postprocess(submitted)

    def _schedule(self) -> Schedule:
        self._admit()
        schedule: Schedule = [
            (s, s.next_tokens(1))
            for s in list(self._running)
            if s.decoding and s.num_output < s.max_new_tokens and self._ensure_kv(s)
        ]
        prompts = sum(not s.decoding for s in self._running)
        max_tokens = self.limits.max_step_tokens
        budget = self._prefill_budget.tokens(len(schedule), prompts, max_tokens)
        for sequence in self._running:
            if budget > 0 and not sequence.decoding:
                chunk = sequence.next_tokens(budget)
                schedule.append((sequence, chunk))
                budget -= len(chunk)
        return schedule

    def _submit(self, schedule: Schedule) -> _Submitted:
        decoding = sum(sequence.decoding for sequence, _ in schedule)
        prompt_tokens = sum(len(tokens) for _, tokens in schedule) - decoding
        rows = []
        for sequence, tokens in schedule:
            complete = sequence.num_computed + len(tokens) == sequence.length
            sampler = sequence.sampler if complete else None
            rows.append(Row(sequence.uid, tokens, sampler, sequence.num_output))
        start = time.perf_counter()
        step = self._engine.submit(rows)
        sampled = []
        for (sequence, tokens), row in zip(schedule, rows, strict=True):
            sequence.num_computed += len(tokens)
            if row.sampler is not None:
                sequence.pending = True
                sampled.append((sequence, row.uid))
        return _Submitted(step, sampled, decoding, prompt_tokens, start)

    def _postprocess(self, submitted: _Submitted) -> None:
        """Append what a step sampled, and emit the deltas."""
        results = submitted.step.result()
        # The step began when it was submitted and the one before had ended.
        start, self._last_end = max(submitted.time, self._last_end), time.perf_counter()
        self._prefill_budget.observe(
            submitted.decoding, submitted.prompt_tokens, self._last_end - start
        )
        deltas = []
        for (sequence, uid), result in zip(submitted.sampled, results, strict=True):
            if sequence.uid != uid:
                continue  # it has left, or starts anew
            # A sequence in the step after this one has another pending token.
            sequence.pending = sequence.num_computed == sequence.length
            if result.token is not None:
                deltas.append(self._append(sequence, result.token, result.ranked))
            else:
                self._remove(sequence)
                self._fail(sequence.request_id, result.error or EngineFailure("no token"))
        if deltas:
            self._emit(deltas)

    def _shed(self, schedule: Schedule, error: Exception) -> None:
        """After a step that had no memory: fail its largest sequence, and run the others anew in a
        smaller KV cache. Raises: `error` if the cache cannot be made smaller."""
        running = [(s, tokens) for s, tokens in schedule if s in self._running]
        for sequence in reversed(list(self._running)):
            self._preempt(sequence)
        if not self._engine.shrink():
            raise error
        total = self._engine.total_tokens
        logger.warning("a step had no memory: the KV cache has %d tokens from now on", total)
        if running:
            largest, _ = max(running, key=lambda each: (len(each[1]), each[0].length))
            self._refuse(largest, "the device has no memory for this request; try a shorter one")

    def _refuse(self, sequence: Sequence, reason: str) -> None:
        self._remove(sequence)
        self._fail(sequence.request_id, EngineFailure(reason))

    def _admit(self) -> None:
        """Admit in order of arrival: small requests must not starve a large one before them."""
        while self._waiting and len(self._running) < self.limits.max_batch_size:
            sequence = self._waiting[0]
            # The KV of the last token is never needed.
            needed = len(sequence.prompt_ids) + sequence.max_new_tokens - 1
            if needed > self._engine.total_tokens:
                total = self._engine.total_tokens
                reason = f"the request may need {needed} tokens of KV; the cache has {total} left"
                self._refuse(sequence, reason)
                continue
            # The running sequences need more KV soon. Without this reserve, they and the new one
            # would preempt each other.
            watermark = min(len(self._running) * BLOCK_SIZE, self._engine.total_tokens // 8)
            sequence.uid = next(self._uids)
            sequence.num_computed = self._engine.open(sequence.uid, sequence.token_ids)
            missing = sequence.length - sequence.num_computed
            if self._engine.free_tokens < missing + watermark or not self._engine.extend(
                sequence.uid, missing
            ):
                self._engine.flush(sequence.uid)
                return
            self._running.append(self._waiting.popleft())

    def _ensure_kv(self, sequence: Sequence) -> bool:
        """Allocate KV for its next token, preempting the youngest if needed; False if that is it
        itself."""
        while sequence in self._running:
            if self._engine.extend(sequence.uid, 1):
                return True
            self._preempt(self._running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._running.remove(sequence)
        self._engine.flush(sequence.uid)
        sequence.leave()
        self._waiting.appendleft(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._engine.flush(sequence.uid)
            sequence.leave()
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def _append(self, sequence: Sequence, token: int, ranked: RankedToken | None) -> TextDelta:
        """Append a sampled token, and remove the sequence if it ends with it."""
        sequence.output_ids.append(token)
        sequence.sampler.record(token)
        count = len(sequence.output_ids)
        reason: FinishReason | None = None
        text = ""
        if token in sequence.eos_ids:
            reason = "stop"
            offset = sequence.detokenizer.text_length
        else:
            may_stop = count >= sequence.sampler.min_new_tokens
            text = sequence.detokenizer.add(token, may_stop=may_stop)
            offset = sequence.detokenizer.token_offset
            if sequence.detokenizer.stopped:
                reason = "stop"
            elif count >= sequence.max_new_tokens:
                reason = "length"
        if reason is not None:
            text += sequence.detokenizer.finish()
            reason = "stop" if sequence.detokenizer.stopped else reason
            self._remove(sequence)
        return TextDelta(
            request_id=sequence.request_id,
            text=text,
            token_ids=[token],
            logprobs=None if ranked is None else [self._logprob(token, ranked, offset)],
            finish_reason=reason,
        )

    def _logprob(self, token: int, ranked: RankedToken, offset: int) -> TokenLogprob:
        def entry(token_id: int, logprob: float, **more: Any) -> TokenLogprob:
            text, raw = self._describe(token_id)
            return TokenLogprob(
                token_id=token_id, token=text, token_bytes=raw, logprob=logprob, **more
            )

        top = tuple(entry(token_id, logprob) for token_id, logprob in ranked.top)
        return entry(token, ranked.logprob, text_offset=offset, top=top)
