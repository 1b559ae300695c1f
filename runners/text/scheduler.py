"""What each step runs: joins and leaves at token boundaries, prompts in chunks beside decodes.

A step holds one token of every running sequence and fills the rest of its token budget with chunks
of the prompts that are still being read (Dynamic SplitFuse, as in DeepSpeed-FastGen,
arXiv:2401.08671), so a long prompt never stalls running streams. A sequence is admitted when its
prompt fits the free KV; when a running one needs a block and none is left, the youngest gives its
KV back, waits, and is computed anew from the tokens it has (recomputation, as in vLLM).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from runners.contracts.errors import EngineFailure
from runners.contracts.text import FinishReason, TextDelta, TokenLogprob
from runners.text.detokenizer import Detokenizer
from runners.text.engine import Engine
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.prefill_budget import Pacer
from runners.text.sampling import RankedToken, SamplerState, sample


@dataclass(eq=False)
class Generation:
    """One request on its way through the engine."""

    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int
    eos_ids: frozenset[int]
    """Tokens that end it; empty under ignore_eos."""
    sampler: SamplerState
    detokenizer: Detokenizer
    uid: int = -1
    generated: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV exists: all but the last while it generates, fewer while it reads."""

    @property
    def length(self) -> int:
        """Tokens it has, prompt and generated."""
        return len(self.prompt_ids) + len(self.generated)

    @property
    def decoding(self) -> bool:
        """Whether the next step computes its newest token, and nothing before it."""
        return self.length - self.computed == 1 and self.computed > 0

    @property
    def tokens(self) -> list[int]:
        """Prompt and generated tokens."""
        return self.prompt_ids + self.generated

    def next_tokens(self, count: int) -> list[int]:
        """At most `count` of the tokens that are still to be computed."""
        if self.decoding and self.generated:
            return [self.generated[-1]]
        return self.tokens[self.computed : self.computed + count]


@dataclass(frozen=True)
class Limits:
    """Bounds of the scheduler, in sequences and tokens."""

    max_batch_size: int
    max_step_tokens: int


class Scheduler:
    """Runs sequences on an engine. One thread calls it.

    `emit` gets each step's deltas, `fail` a request that ends with an error of its own; `describe`
    gives a token's text and bytes.
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
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._uids = itertools.count()
        self._pacer = Pacer()
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences not yet admitted."""
        return len(self._waiting)

    @property
    def kv_used(self) -> int:
        """Tokens of KV in use, in whole blocks."""
        return self._engine.total_tokens - self._engine.free_tokens

    def add(self, sequence: Generation) -> None:
        """Queue a sequence that alone fits the KV cache with all it may generate."""
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a sequence and free its KV; unknown ids are ignored."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.request_id == request_id:
                self._leave(sequence)

    def step(self) -> None:
        """Admit, compute one step, sample, and emit what it added."""
        self._admit()
        plan = self._plan()
        if not plan:
            return
        decoding = sum(sequence.decoding for sequence, _ in plan)
        began = time.perf_counter()
        logits = self._engine.put([s.uid for s, _ in plan], [tokens for _, tokens in plan])
        prompt_tokens = sum(len(tokens) for _, tokens in plan) - decoding
        self._pacer.observe(decoding, prompt_tokens, time.perf_counter() - began)
        for sequence, tokens in plan:
            sequence.computed += len(tokens)
        rows = [i for i, (sequence, _) in enumerate(plan) if sequence.computed == sequence.length]
        if not rows:
            return
        chosen = logits if len(rows) == len(plan) else logits[rows]
        deltas = self._sample([plan[i][0] for i in rows], chosen)
        if deltas:
            self._emit(deltas)

    def _sample(self, sequences: list[Generation], logits: torch.Tensor) -> list[TextDelta]:
        """A token for each sequence; one whose sampling fails ends alone."""
        broken = logits.sum(-1).isnan().tolist()
        if any(broken):
            for sequence, nan in zip(sequences, broken, strict=True):
                if nan:
                    self._leave(sequence)
                    error = EngineFailure("the model's output is not a number")
                    self._fail(sequence.request_id, error)
            whole = [i for i, nan in enumerate(broken) if not nan]
            return self._sample([sequences[i] for i in whole], logits[whole]) if whole else []
        try:
            tokens, ranked = sample(logits, [s.sampler for s in sequences])
        except Exception as error:
            if len(sequences) == 1:
                self._leave(sequences[0])
                self._fail(sequences[0].request_id, error)
                return []
            each = (self._sample([s], logits[i : i + 1]) for i, s in enumerate(sequences))
            return [delta for deltas in each for delta in deltas]
        return [self._advance(*item) for item in zip(sequences, tokens, ranked, strict=True)]

    def _admit(self) -> None:
        """First come, first served: a small one behind must not starve the one in front."""
        while self._waiting and len(self._running) < self.limits.max_batch_size:
            sequence = self._waiting[0]
            # What runs will soon want more: without some air, they would only push each other out.
            air = min(len(self._running) * BLOCK_SIZE, self._engine.total_tokens // 8)
            sequence.uid = next(self._uids)
            sequence.computed = self._engine.open(sequence.uid, sequence.tokens)
            missing = sequence.length - sequence.computed
            if self._engine.free_tokens < missing + air or not self._engine.extend(
                sequence.uid, missing
            ):
                self._engine.flush(sequence.uid)
                return
            self._running.append(self._waiting.popleft())

    def _plan(self) -> list[tuple[Generation, Sequence[int]]]:
        plan: list[tuple[Generation, Sequence[int]]] = [
            (s, s.next_tokens(1)) for s in list(self._running) if s.decoding and self._room(s)
        ]
        prompts = len(self._running) - len(plan)
        budget = self._pacer.budget(len(plan), prompts, self.limits.max_step_tokens)
        for sequence in self._running:
            if budget > 0 and not sequence.decoding:
                chunk = sequence.next_tokens(budget)
                plan.append((sequence, chunk))
                budget -= len(chunk)
        return plan

    def _room(self, sequence: Generation) -> bool:
        """Room for the token it computes next, taken from the youngest if need be."""
        while sequence in self._running:
            if self._engine.extend(sequence.uid, 1):
                return True
            self._preempt(self._running[-1])
        return False

    def _preempt(self, sequence: Generation) -> None:
        self.preemptions += 1
        self._running.remove(sequence)
        self._engine.flush(sequence.uid)
        sequence.computed = 0
        self._waiting.appendleft(sequence)

    def _advance(self, sequence: Generation, token: int, ranked: RankedToken | None) -> TextDelta:
        """Take a sampled token: text, end, and the delta that says so."""
        sequence.generated.append(token)
        generated = len(sequence.generated)
        reason: FinishReason | None = None
        text = ""
        if token in sequence.eos_ids:
            reason = "stop"
        else:
            may_stop = generated >= sequence.sampler.min_new_tokens
            text = sequence.detokenizer.add(token, may_stop=may_stop)
            if sequence.detokenizer.stopped:
                reason = "stop"
            elif generated >= sequence.max_new_tokens:
                reason = "length"
        if reason is not None:
            text += sequence.detokenizer.finish()
            reason = "stop" if sequence.detokenizer.stopped else reason
            self._leave(sequence)
        return TextDelta(
            request_id=sequence.request_id,
            text=text,
            token_ids=[token],
            logprobs=None if ranked is None else [self._logprob(token, ranked)],
            finish_reason=reason,
        )

    def _logprob(self, token: int, ranked: RankedToken) -> TokenLogprob:
        def named(token_id: int, logprob: float, top: list[TokenLogprob]) -> TokenLogprob:
            text, raw = self._describe(token_id)
            return TokenLogprob(
                token_id=token_id, token=text, token_bytes=raw, logprob=logprob, top=top
            )

        return named(token, ranked.logprob, [named(t, p, []) for t, p in ranked.top])

    def _leave(self, sequence: Generation) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._engine.flush(sequence.uid)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
