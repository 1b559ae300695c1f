"""Extractive question answering, as the pipeline of transformers 4 did it; version 5 has none.

A context longer than a window is read in windows that overlap. In each, the probability of a span
is that of its first token as a start times that of its last as an end, each a softmax over the
context's tokens and the CLS token, which stands for "no answer" (arXiv:1810.04805, section 4.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from runners.contracts.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from runners.contracts.tasks import Finding, TaskOptions, TaskRequest

WINDOW = 384
"""Longest window in tokens, question included."""
OVERLAP = 128
"""Tokens that neighbouring windows share."""
FORWARD_WINDOWS = 32
"""Windows in one forward, at most."""


@dataclass(frozen=True)
class _Window:
    inputs: dict[str, list[int]]
    encoding: Any
    """The tokenizer's, which knows where tokens and words lie in the context."""
    context: int
    """Which of the two texts in the encoding is the context."""
    cls: int | None
    """Where the CLS token is."""


class QuestionAnswering:
    """See `program.Task`. `longest`: of a window, in tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, longest: int) -> None:
        if not tokenizer.is_fast:
            raise ConfigError("question-answering needs a tokenizer.json, which tells places")
        if model.config.num_labels != 2:
            raise ConfigError(
                f"question-answering needs a head of 2 labels, for the answer's first and last "
                f"token; this model's has {model.config.num_labels}"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._window = min(longest, WINDOW)
        self._cls_id = tokenizer.cls_token_id

    def check(self, request: TaskRequest) -> None:
        """Raises: InvalidRequest, ContextLengthExceeded."""
        if request.question is None:
            raise InvalidRequest("is missing", field="question")
        if self._room(request.question) < 2:
            raise ContextLengthExceeded(
                f"leaves no room for the context in {self._window} tokens",
                field="question",
            )

    def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        """As few forwards as hold all windows of all requests."""
        windows = [list(self._windows(request)) for request in requests]
        logits = self._logits([window for several in windows for window in several])
        return [
            _best(request, [(window, *next(logits)) for window in several])
            for request, several in zip(requests, windows, strict=True)
        ]

    def _room(self, question: str) -> int:
        """Tokens of context that a window holds beside a question."""
        asked = self._tokenizer(question, add_special_tokens=False, verbose=False).input_ids
        return int(self._window - len(asked) - self._tokenizer.num_special_tokens_to_add(pair=True))

    def _windows(self, request: TaskRequest) -> Iterator[_Window]:
        question = request.question or ""
        first = self._tokenizer.padding_side == "right"
        encoded = self._tokenizer(
            *((question, request.text) if first else (request.text, question)),
            truncation="only_second" if first else "only_first",
            max_length=self._window,
            stride=min(OVERLAP, self._window // 2, self._room(question) // 2),
            return_overflowing_tokens=True,
        )
        for i, encoding in enumerate(encoded.encodings):
            names = [n for n in self._tokenizer.model_input_names if n in encoded]
            ids = encoded["input_ids"][i]
            yield _Window(
                {name: encoded[name][i] for name in names},
                encoding,
                context=1 if first else 0,
                cls=ids.index(self._cls_id) if self._cls_id in ids else None,
            )

    def _logits(self, windows: list[_Window]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Start and end logits of each window, of as many tokens as it has."""
        size = FORWARD_WINDOWS if self._tokenizer.pad_token_id is not None else 1
        right = self._tokenizer.padding_side == "right"
        for begin in range(0, len(windows), size):
            batch = windows[begin : begin + size]
            inputs = [window.inputs for window in batch]
            padded: dict[str, torch.Tensor] = (
                self._tokenizer.pad(inputs, return_tensors="pt")
                if size > 1
                else {name: torch.tensor([ids]) for name, ids in inputs[0].items()}
            )
            out = self._model(**{name: t.to(self._model.device) for name, t in padded.items()})
            starts, ends = out.start_logits.float().cpu(), out.end_logits.float().cpu()
            for window, start, end in zip(batch, starts, ends, strict=True):
                count = len(window.inputs["input_ids"])
                own = slice(count) if right else slice(len(start) - count, None)
                yield start[own], end[own]


def _best(
    request: TaskRequest, windows: list[tuple[_Window, torch.Tensor, torch.Tensor]]
) -> list[Finding]:
    """The best answers over all windows; of a span that several found, the best score."""
    options = request.options
    top_k = options.top_k or 1
    spans: dict[tuple[int, int], float] = {}
    no_answer = 1.0
    for window, start, end in windows:
        allowed = torch.tensor([s == window.context for s in window.encoding.sequence_ids])
        none, scores = _scores(window, start, end, allowed)
        no_answer = min(no_answer, none)
        for first, last, score in _likeliest(scores, options):
            if not (allowed[first] and allowed[last] and first <= last):
                continue  # no span, though it is among as many as were asked for
            span = _characters(window, first, last)
            spans[span] = max(score, spans.get(span, 0.0))
    findings = [
        Finding(score=score, text=request.text[a:b], start=a, end=b)
        for (a, b), score in spans.items()
    ]
    if options.handle_impossible_answer:
        findings.append(Finding(score=no_answer, text="", start=0, end=0))
    return sorted(findings, key=lambda each: -each.score)[:top_k]


def _scores(
    window: _Window, start: torch.Tensor, end: torch.Tensor, allowed: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """The probability of no answer, and [first, last] that of each span."""
    normalised = allowed.clone()
    if window.cls is not None:
        normalised[window.cls] = True
    first = start.masked_fill(~normalised, -torch.inf).softmax(-1)
    last = end.masked_fill(~normalised, -torch.inf).softmax(-1)
    none = 0.0
    if window.cls is not None:
        none = float(first[window.cls] * last[window.cls])
        first[window.cls] = last[window.cls] = 0
    return none, torch.outer(first, last)


def _likeliest(scores: torch.Tensor, options: TaskOptions) -> Iterator[tuple[int, int, float]]:
    spans = scores.triu().tril(options.max_answer_len - 1).flatten()
    # More than asked for: several may be parts of the same words.
    best = spans.topk(min(2 * (options.top_k or 1) + 10, len(spans)))
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield index // len(scores), index % len(scores), score


def _characters(window: _Window, first: int, last: int) -> tuple[int, int]:
    """Where a span of tokens begins and ends in the context, whole words if it has words."""
    encoding, context = window.encoding, window.context
    words = encoding.token_to_word(first), encoding.token_to_word(last)
    if None in words:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    begin, end = (encoding.word_to_chars(word, context) for word in words)
    return begin[0], end[1]
