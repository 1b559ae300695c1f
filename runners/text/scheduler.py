"""The scheduler: decides what each step computes, and turns its logits into text deltas.

`program` calls it in rank 0. Sequences join and leave the batch between steps. A step computes one
token of every decoding sequence and fills the rest of its budget with chunks of prompts (Dynamic
SplitFuse, as in DeepSpeed-FastGen, arXiv:2401.08671), so that a long prompt never stalls running
streams. A sequence is admitted once its prompt fits the free KV. If a running sequence needs a
block and none is free, the youngest is preempted: it loses its KV, waits, and is recomputed from
its tokens (as in vLLM).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from runners.contracts.errors import EngineFailure
from runners.contracts.text import FinishReason, TextDelta, TokenLogprob
from runners.text.detokenizer import Detokenizer
from runners.text.engine import Engine
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.prefill_budget import PrefillBudget
from runners.text.sampling import RankedToken, SamplerState, sample


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
    num_computed: int = field(default=0, init=False)
    """Tokens whose KV exists: all except the last while it decodes, fewer during prefill."""

    @property
    def length(self) -> int:
        """Number of its tokens, prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def decoding(self) -> bool:
        """Whether only its newest token is to be computed."""
        return self.length - self.num_computed == 1 and self.num_computed > 0

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output tokens."""
        return self.prompt_ids + self.output_ids

    def next_tokens(self, count: int) -> list[int]:
        """The first `count` tokens of those that are still to be computed."""
        if self.decoding and self.output_ids:
            return [self.output_ids[-1]]
        return self.token_ids[self.num_computed : self.num_computed + count]


@dataclass(frozen=True)
class Limits:
    """Bounds of a step, in sequences and tokens."""

    max_batch_size: int
    max_step_tokens: int


Schedule = list[tuple[Sequence, list[int]]]
"""The sequences of a step, each with the tokens that the step computes."""


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
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self._waiting or self._running)

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
        """Run one step: schedule, compute, sample, emit."""
        schedule = self._schedule()
        if schedule:
            logits = self._run(schedule)
            self._postprocess(schedule, logits)

    def _schedule(self) -> Schedule:
        self._admit()
        schedule: Schedule = [
            (s, s.next_tokens(1)) for s in list(self._running) if s.decoding and self._ensure_kv(s)
        ]
        prompts = len(self._running) - len(schedule)
        max_tokens = self.limits.max_step_tokens
        budget = self._prefill_budget.tokens(len(schedule), prompts, max_tokens)
        for sequence in self._running:
            if budget > 0 and not sequence.decoding:
                chunk = sequence.next_tokens(budget)
                schedule.append((sequence, chunk))
                budget -= len(chunk)
        return schedule

    def _run(self, schedule: Schedule) -> torch.Tensor:
        """Logits `[n, vocab]` of each sequence's last scheduled token."""
        decoding = sum(sequence.decoding for sequence, _ in schedule)
        prompt_tokens = sum(len(tokens) for _, tokens in schedule) - decoding
        start = time.perf_counter()
        logits = self._engine.put([s.uid for s, _ in schedule], [tokens for _, tokens in schedule])
        self._prefill_budget.observe(decoding, prompt_tokens, time.perf_counter() - start)
        return logits

    def _postprocess(self, schedule: Schedule, logits: torch.Tensor) -> None:
        """Sample for the sequences whose tokens are all computed, and emit the deltas."""
        for sequence, tokens in schedule:
            sequence.num_computed += len(tokens)
        rows = [i for i, (s, _) in enumerate(schedule) if s.num_computed == s.length]
        if not rows:
            return
        last_logits = logits if len(rows) == len(schedule) else logits[rows]
        deltas = self._sample([schedule[i][0] for i in rows], last_logits)
        if deltas:
            self._emit(deltas)

    def _admit(self) -> None:
        """Admit in order of arrival: small requests must not starve a large one before them."""
        while self._waiting and len(self._running) < self.limits.max_batch_size:
            sequence = self._waiting[0]
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
        sequence.num_computed = 0
        self._waiting.appendleft(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._engine.flush(sequence.uid)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[TextDelta]:
        """One token per sequence. A sequence that cannot be sampled fails alone."""
        nan_rows = logits.sum(-1).isnan().tolist()
        if any(nan_rows):
            for sequence, is_nan in zip(sequences, nan_rows, strict=True):
                if is_nan:
                    self._remove(sequence)
                    error = EngineFailure("the model's logits are not numbers (NaN)")
                    self._fail(sequence.request_id, error)
            valid = [i for i, is_nan in enumerate(nan_rows) if not is_nan]
            return self._sample([sequences[i] for i in valid], logits[valid]) if valid else []
        try:
            tokens, ranked = sample(logits, [s.sampler for s in sequences])
        except Exception as error:
            if len(sequences) == 1:
                self._remove(sequences[0])
                self._fail(sequences[0].request_id, error)
                return []
            each = (self._sample([s], logits[i : i + 1]) for i, s in enumerate(sequences))
            return [delta for deltas in each for delta in deltas]
        return [self._append(*item) for item in zip(sequences, tokens, ranked, strict=True)]

    def _append(self, sequence: Sequence, token: int, ranked: RankedToken | None) -> TextDelta:
        """Append a sampled token, and remove the sequence if it ends with it."""
        sequence.output_ids.append(token)
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
