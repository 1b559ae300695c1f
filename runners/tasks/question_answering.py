"""Extractive question answering, as the pipeline of transformers 4 did it; version 5 has none.

A context longer than a window is read in overlapping windows. In each window, the probability of a
span is the probability of its first token as a start times that of its last token as an end. Each
is a softmax over the tokens of the context and the CLS token, which stands for "no answer"
(arXiv:1810.04805, section 4.3). Used by `runners.engines.tasks`, in rank processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from runners.contracts.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from runners.contracts.tasks import Finding, TaskOptions, TaskRequest
from runners.tasks.program import Task

WINDOW = 384
"""Maximum length of a window in tokens, question included."""
OVERLAP = 128
"""Tokens that neighbouring windows share."""
FORWARD_WINDOWS = 32
"""Maximum number of windows in one forward."""


@dataclass(frozen=True)
class _Window:
    inputs: dict[str, list[int]]
    """The model's inputs by name."""
    encoding: Any
    """The tokenizer's encoding, which maps tokens to words and to characters of the context."""
    context: int
    """Index of the context among the two texts of the encoding."""
    cls: int | None
    """Index of the CLS token; None if there is none."""


class QuestionAnswering(Task):
    """Spans of a context that answer a question; the model takes at most `max_tokens` tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, max_tokens: int) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                "question-answering needs a tokenizer.json, which maps tokens to characters"
            )
        if model.config.num_labels != 2:
            raise ConfigError(
                "question-answering needs a head of 2 labels, for the first and the last token of "
                f"the answer; this model's head has {model.config.num_labels}"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._window = min(max_tokens, WINDOW)
        self._cls_id = tokenizer.cls_token_id

    @override
    def check(self, request: TaskRequest) -> None:
        if request.question is None:
            raise InvalidRequest("is missing", field="question")
        if self._context_tokens(request.question) < 2:
            raise ContextLengthExceeded(
                f"leaves no room for the context in {self._window} tokens",
                field="question",
            )

    @override
    def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        windows = [list(self._windows(request)) for request in requests]
        # The windows of all requests share forwards.
        logits = self._logits([window for group in windows for window in group])
        return [
            _best(request, [(window, *next(logits)) for window in group])
            for request, group in zip(requests, windows, strict=True)
        ]

    def _context_tokens(self, question: str) -> int:
        """How many tokens of context fit into a window with a question."""
        encoded = self._tokenizer(question, add_special_tokens=False, verbose=False)
        special = self._tokenizer.num_special_tokens_to_add(pair=True)
        return int(self._window - len(encoded.input_ids) - special)

    def _windows(self, request: TaskRequest) -> Iterator[_Window]:
        question = request.question or ""
        question_first = self._tokenizer.padding_side == "right"
        texts = (question, request.text) if question_first else (request.text, question)
        encoded = self._tokenizer(
            *texts,
            truncation="only_second" if question_first else "only_first",
            max_length=self._window,
            stride=min(OVERLAP, self._window // 2, self._context_tokens(question) // 2),
            return_overflowing_tokens=True,
        )
        names = [name for name in self._tokenizer.model_input_names if name in encoded]
        for i, encoding in enumerate(encoded.encodings):
            token_ids = encoded["input_ids"][i]
            yield _Window(
                {name: encoded[name][i] for name in names},
                encoding,
                context=1 if question_first else 0,
                cls=token_ids.index(self._cls_id) if self._cls_id in token_ids else None,
            )

    def _logits(self, windows: list[_Window]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Start and end logits of each window, both of shape (tokens of the window,)."""
        size = FORWARD_WINDOWS if self._tokenizer.pad_token_id is not None else 1
        pads_right = self._tokenizer.padding_side == "right"
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
                unpadded = slice(count) if pads_right else slice(len(start) - count, None)
                yield start[unpadded], end[unpadded]


def _best(
    request: TaskRequest, windows: list[tuple[_Window, torch.Tensor, torch.Tensor]]
) -> list[Finding]:
    """The best answers over all windows with their logits; a span keeps its best score."""
    options = request.options
    top_k = options.top_k or 1
    spans: dict[tuple[int, int], float] = {}
    no_answer = 1.0
    for window, start, end in windows:
        in_context = torch.tensor([s == window.context for s in window.encoding.sequence_ids])
        window_no_answer, scores = _scores(window, start, end, in_context)
        no_answer = min(no_answer, window_no_answer)
        for first, last, score in _likeliest(scores, options):
            if not (in_context[first] and in_context[last] and first <= last):
                continue  # no valid span: it is listed only where there are few others
            span = _characters(window, first, last)
            spans[span] = max(score, spans.get(span, 0.0))
    findings = [
        Finding(score=score, text=request.text[a:b], start=a, end=b)
        for (a, b), score in spans.items()
    ]
    if options.handle_impossible_answer:
        findings.append(Finding(score=no_answer, text="", start=0, end=0))
    return sorted(findings, key=lambda finding: -finding.score)[:top_k]


def _scores(
    window: _Window, start: torch.Tensor, end: torch.Tensor, in_context: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """The probability of no answer, and those of all spans, of shape (first, last) token."""
    normalised = in_context.clone()
    if window.cls is not None:
        normalised[window.cls] = True
    first = start.masked_fill(~normalised, -torch.inf).softmax(-1)
    last = end.masked_fill(~normalised, -torch.inf).softmax(-1)
    no_answer = 0.0
    if window.cls is not None:
        no_answer = float(first[window.cls] * last[window.cls])
        first[window.cls] = last[window.cls] = 0
    return no_answer, torch.outer(first, last)


def _likeliest(scores: torch.Tensor, options: TaskOptions) -> Iterator[tuple[int, int, float]]:
    """First token, last token and score of the best spans, best first."""
    spans = scores.triu().tril(options.max_answer_len - 1).flatten()
    # More than `top_k`: several spans may begin and end in the same words.
    best = spans.topk(min(2 * (options.top_k or 1) + 10, len(spans)))
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield index // len(scores), index % len(scores), score


def _characters(window: _Window, first: int, last: int) -> tuple[int, int]:
    """The characters of a span of tokens in the context, extended to whole words if it has words.

    Returns the index of the first and the index after the last.
    """
    encoding, context = window.encoding, window.context
    words = encoding.token_to_word(first), encoding.token_to_word(last)
    if None in words:
        return encoding.offsets[first][0], encoding.offsets[last][1]
    begin, end = (encoding.word_to_chars(word, context) for word in words)
    return begin[0], end[1]
