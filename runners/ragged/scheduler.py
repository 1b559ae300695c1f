"""What each step runs: joins and leaves at token boundaries, prompts in chunks beside decodes.

A step holds one token of every running sequence and fills the rest of its token budget with chunks
of the prompts that are still being read (Dynamic SplitFuse, as in DeepSpeed-FastGen,
arXiv:2401.08671), so a long prompt never stalls running streams. A sequence is admitted when its
prompt and all the tokens it may generate fit the KV budget, so it never runs out midway.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from runners.contracts import FinishReason, TextDelta, TokenLogprob
from runners.ragged.detokenizer import Detokenizer
from runners.ragged.engine import Engine
from runners.ragged.sampling import RankedToken, SamplerState, sample


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
    computed: int = 0
    """Prompt tokens whose KV exists."""
    last_token: int = -1

    @property
    def need(self) -> int:
        """KV tokens it may come to hold. The last token is sampled but never fed back."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.computed < len(self.prompt_ids)


@dataclass(frozen=True)
class Limits:
    """Bounds of the scheduler, in sequences and tokens."""

    max_batch_size: int
    max_step_tokens: int
    max_kv_tokens: int


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
        self.kv_reserved = 0

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

    def add(self, sequence: Generation) -> None:
        """Queue a sequence whose `need` fits the limits."""
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
        logits = self._engine.put([s.uid for s, _ in plan], [tokens for _, tokens in plan])
        for sequence, tokens in plan:
            if sequence.prefilling:
                sequence.computed += len(tokens)
        rows = [i for i, (sequence, _) in enumerate(plan) if not sequence.prefilling]
        if not rows:
            return
        chosen = logits if len(rows) == len(plan) else logits[rows]
        deltas = self._sample([plan[i][0] for i in rows], chosen)
        if deltas:
            self._emit(deltas)

    def _sample(self, sequences: list[Generation], logits: torch.Tensor) -> list[TextDelta]:
        """A token for each sequence; one whose sampling fails ends alone."""
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
        limits = self.limits
        while self._waiting and len(self._running) < limits.max_batch_size:
            sequence = self._waiting[0]
            if self.kv_reserved + sequence.need > limits.max_kv_tokens:
                return  # first come, first served: a small one behind must not starve this one
            self._waiting.popleft()
            sequence.uid = next(self._uids)
            self._engine.reserve(sequence.uid, sequence.need)
            self.kv_reserved += sequence.need
            self._running.append(sequence)

    def _plan(self) -> list[tuple[Generation, Sequence[int]]]:
        plan: list[tuple[Generation, Sequence[int]]] = [
            (s, [s.last_token]) for s in self._running if not s.prefilling
        ]
        budget = max(self.limits.max_step_tokens - len(plan), 1)
        for sequence in self._running:
            if sequence.prefilling and budget > 0:
                chunk = sequence.prompt_ids[sequence.computed : sequence.computed + budget]
                plan.append((sequence, chunk))
                budget -= len(chunk)
        return plan

    def _advance(self, sequence: Generation, token: int, ranked: RankedToken | None) -> TextDelta:
        """Take a sampled token: text, end, and the delta that says so."""
        sequence.last_token = token
        generated = sequence.sampler.generated
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
            self.kv_reserved -= sequence.need
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
