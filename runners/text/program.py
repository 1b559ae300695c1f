"""TextProgram: what a rank runs for a text model: messages in, scheduler steps, deltas out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from runners.contracts.errors import ContextLengthExceeded, InvalidRequest
from runners.contracts.text import ChatPrompt, GenerationRequest, ModelInfo
from runners.hf.models import SamplingDefaults
from runners.protocol.messages import (
    Abort,
    Accepted,
    CallFailed,
    Deltas,
    Detokenize,
    Failed,
    HostMessage,
    RankMessage,
    Submit,
    Text,
    Tokenize,
    Tokens,
    failure,
)
from runners.rank.program import Occupancy
from runners.text.detokenizer import Detokenizer
from runners.text.engine import Engine
from runners.text.sampling import SamplerState
from runners.text.scheduler import Generation, Limits, Scheduler
from runners.text.tokenization import PromptTokenizer

IDLE_S = 0.5
DEFAULT_NEW_TOKENS = 256
CONTEXT_TOKENS = 6
TOKENIZER_THREADS = 2


class TextProgram:
    """See `ranks.worker.RankProgram`.

    Prompts are tokenised in threads of their own, so that a huge one delays nobody's next token.
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
        self.info = info
        self._engine = engine
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._defaults = defaults
        self._max_prompt_tokens = max_prompt_tokens
        self._default_new_tokens = default_new_tokens or max_prompt_tokens or DEFAULT_NEW_TOKENS
        self._emit = emit
        self._scheduler = Scheduler(
            engine,
            limits,
            emit=lambda deltas: emit(Deltas(deltas)),
            fail=lambda request_id, error: emit(failure(request_id, error)),
            describe=self._describe_token,
        )
        self._inbox: queue.SimpleQueue[Generation | Abort] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._lock = threading.Lock()
        self._preparing: set[str] = set()

    def receive(self, message: HostMessage) -> None:
        """Take a message of the host; called by the reader thread."""
        match message:
            case Submit(request):
                with self._lock:
                    self._preparing.add(request.request_id)
                self._pool.submit(self._prepare, request)
            case Abort(request_id):
                with self._lock:
                    self._preparing.discard(request_id)
                self._inbox.put(message)
            case Tokenize() | Detokenize():
                self._pool.submit(self._answer, message)
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    def step(self) -> None:
        """Take in what arrived, waiting for it if there is nothing to do, and run one step."""
        try:
            self._take(self._inbox.get(block=not self._scheduler.busy, timeout=IDLE_S))
            while True:
                self._take(self._inbox.get_nowait())
        except queue.Empty:
            pass
        if self._scheduler.busy:
            self._scheduler.step()
        else:
            self._engine.idle()

    def occupancy(self) -> Occupancy:
        """How full the scheduler is."""
        scheduler = self._scheduler
        return Occupancy(
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_tokens_used=scheduler.kv_used,
            kv_tokens_total=self._engine.total_tokens,
        )

    def _take(self, item: Generation | Abort) -> None:
        if isinstance(item, Abort):
            self._scheduler.abort(item.request_id)
        else:
            self._scheduler.add(item)

    def _prepare(self, request: GenerationRequest) -> None:
        """In a tokenizer thread: validate, accept or refuse, and queue."""
        try:
            prepared: Generation | Failed = self._sequence(request)
        except Exception as error:  # one request's tokenizer trouble must not end the rank
            prepared = failure(request.request_id, error)
        with self._lock:
            if request.request_id not in self._preparing:
                return  # aborted meanwhile
            self._preparing.discard(request.request_id)
            if isinstance(prepared, Failed):
                self._emit(prepared)
                return
            # Under the lock, so that an abort is queued behind what it aborts.
            self._emit(Accepted(request.request_id, len(prepared.prompt_ids)))
            self._inbox.put(prepared)

    def _sequence(self, request: GenerationRequest) -> Generation:
        params = request.sampling
        ids = self._tokenizer.begin(
            self._tokenizer.encode(request.prompt, max_tokens=self.info.max_model_len)
        )
        room = self._room(len(ids))
        wanted = params.max_new_tokens
        if wanted is None:
            default = params.default_new_tokens or self._default_new_tokens
            wanted = min(room, max(default, params.min_new_tokens))
        if wanted > room:
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {wanted}, but the model's "
                f"context holds {len(ids) + room}: at most {room} more tokens fit",
                param="max_new_tokens",
            )
        if params.min_new_tokens > wanted:
            raise InvalidRequest(
                f"min_new_tokens ({params.min_new_tokens}) exceeds max_new_tokens ({wanted})",
                param="min_new_tokens",
            )
        stop_ids = self._tokenizer.special_ids(params.stop)
        return Generation(
            request_id=request.request_id,
            prompt_ids=ids,
            max_new_tokens=wanted,
            eos_ids=stop_ids if params.ignore_eos else stop_ids | self._eos_ids,
            sampler=SamplerState(params, self._defaults, ids, stop_ids | self._eos_ids),
            detokenizer=Detokenizer(
                self._tokenizer.tokenizer,
                params.stop,
                # An answer in a chat begins anew; a continuation's first token needs what it
                # continues, or SentencePiece tokenizers lose the space before it.
                context=() if isinstance(request.prompt, ChatPrompt) else ids[-CONTEXT_TOKENS:],
            ),
        )

    def _room(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt. Raises: ContextLengthExceeded if none."""
        context = self.info.max_model_len
        longest = min(self._max_prompt_tokens or context, context - 1)
        if prompt_tokens > longest:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens; at most {longest} are allowed",
                param="prompt",
            )
        return context - prompt_tokens

    def _answer(self, call: Tokenize | Detokenize) -> None:
        try:
            if isinstance(call, Tokenize):
                ids = self._tokenizer.encode(
                    call.prompt, add_special_tokens=call.add_special_tokens
                )
                self._emit(Tokens(call.call_id, ids))
            else:
                text = self._tokenizer.decode(
                    call.token_ids, skip_special_tokens=call.skip_special_tokens
                )
                self._emit(Text(call.call_id, text))
        except Exception as error:  # as in _prepare
            failed = failure("", error)
            self._emit(CallFailed(call.call_id, failed.kind, failed.message, failed.param))

    def _describe_token(self, token_id: int) -> tuple[str, bytes]:
        raw = self._tokenizer.token_bytes(token_id)
        return raw.decode("utf-8", errors="replace"), raw
