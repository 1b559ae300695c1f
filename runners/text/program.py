"""TextProgram: the program of rank 0 of a text model.

The rank's reader thread calls `receive`, the processes of a `TokenizerPool` tokenise, the main
thread runs the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from typing_extensions import override

from runners.contracts.text import ChatPrompt, GenerationRequest, ModelInfo
from runners.hf.models import SamplingDefaults
from runners.protocol.messages import (
    Abort,
    AbortCall,
    Accepted,
    Detokenize,
    Events,
    HostMessage,
    RankMessage,
    Submit,
    Tokenize,
    request_failed,
)
from runners.rank.inbox import Inbox
from runners.rank.program import Occupancy, RankProgram
from runners.text.detokenizer import Detokenizer
from runners.text.engine import Engine
from runners.text.requests import check_logit_bias, token_limit
from runners.text.sampling import SamplerState
from runners.text.scheduler import Limits, Scheduler, Sequence
from runners.text.tokenization import PromptTokenizer
from runners.text.tokenizer_pool import TokenizerPool
from runners.text.tokenizer_process import TokenizerProcess

CONTEXT_TOKENS = 6
"""Tokens at the end of a prompt that the text of its continuation may depend on."""


class TextProgram(RankProgram):
    """Tokenises the prompts of a text model and schedules its sequences.

    Separate processes tokenise, so that a prompt does not delay the next token of others, and takes
    no more time and memory than it may.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        engine: Engine,
        tokenizer: PromptTokenizer,
        limits: Limits,
        eos_ids: frozenset[int],
        defaults: SamplingDefaults,
        max_prompt_tokens: int | None,
        default_new_tokens: int | None,
        emit: Callable[[RankMessage], None],
    ) -> None:
        self._info = info
        self._engine = engine
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._defaults = defaults
        self._max_prompt_tokens = max_prompt_tokens
        self._default_new_tokens = (
            default_new_tokens or max_prompt_tokens or defaults.max_new_tokens
        )
        self._emit = emit
        self._scheduler = Scheduler(
            engine,
            limits,
            emit=lambda deltas: emit(Events(list(deltas))),
            fail=lambda request_id, error: emit(request_failed(request_id, error)),
            describe=self._describe_token,
        )
        self._inbox = Inbox[Sequence | Abort]()
        self._tokenizers = TokenizerPool(tokenizer)

    @property
    @override
    def info(self) -> ModelInfo:
        return self._info

    @override
    def receive(self, message: HostMessage) -> None:
        match message:
            case Submit(GenerationRequest() as request):
                sequence = functools.partial(self._sequence, request)
                self._tokenizers.prepare(request.request_id, sequence, self._accept, self._emit)
            case Abort(request_id):
                self._tokenizers.abort(request_id)
                self._inbox.put(message)
            case Tokenize() | Detokenize():
                self._tokenizers.answer(message, self._emit)
            case AbortCall(call_id):
                self._tokenizers.abort(call_id)
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    @override
    def step(self) -> None:
        for item in self._inbox.take(wait=not self._scheduler.busy):
            if isinstance(item, Abort):
                self._scheduler.abort(item.request_id)
            else:
                self._scheduler.add(item)
        if self._scheduler.busy:
            self._scheduler.step()
        else:
            self._engine.idle()

    @override
    def occupancy(self) -> Occupancy:
        scheduler = self._scheduler
        return Occupancy(
            running=scheduler.running,
            waiting=scheduler.waiting + len(self._tokenizers),
            kv_tokens_used=scheduler.kv_used,
            kv_tokens_total=self._engine.total_tokens,
        )

    def _accept(self, sequence: Sequence) -> None:
        """In a tokenizer thread: queue the request, before an abort of it can be queued."""
        self._emit(Accepted(sequence.request_id, len(sequence.prompt_ids), sequence.max_new_tokens))
        self._inbox.put(sequence)

    def _sequence(self, request: GenerationRequest, tokenizer: TokenizerProcess) -> Sequence:
        """In a tokenizer thread. Raises: what refuses the request."""
        params = request.sampling
        check_logit_bias(params, self.info.vocab_size)
        ids = self._tokenizer.ensure_not_empty(tokenizer.encode(request.prompt))
        stop = self._defaults.stop if params.stop is None else params.stop
        end_ids = self._tokenizer.special_ids(stop)
        sampler = SamplerState(params, self._defaults, ids, end_ids | self._eos_ids)
        ignore_eos = self._defaults.ignore_eos if params.ignore_eos is None else params.ignore_eos
        return Sequence(
            request_id=request.request_id,
            prompt_ids=ids,
            max_new_tokens=token_limit(
                params,
                len(ids),
                max_model_len=self.info.max_model_len,
                min_new_tokens=sampler.min_new_tokens,
                max_prompt_tokens=self._max_prompt_tokens,
                default_new_tokens=self._default_new_tokens,
            ),
            eos_ids=end_ids if ignore_eos else end_ids | self._eos_ids,
            sampler=sampler,
            detokenizer=Detokenizer(
                self._tokenizer.tokenizer,
                stop,
                # A continuation's first token is decoded after the end of the prompt, or
                # SentencePiece tokenizers lose the space before it. A chat's answer starts anew.
                context=() if isinstance(request.prompt, ChatPrompt) else ids[-CONTEXT_TOKENS:],
            ),
        )

    def _describe_token(self, token_id: int) -> tuple[str, bytes]:
        raw = self._tokenizer.token_bytes(token_id)
        return raw.decode("utf-8", errors="replace"), raw
