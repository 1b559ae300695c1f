"""The tasks that `transformers.pipeline` has: options into its keywords, its output into findings.

Used by `runners.engines.tasks`, in rank processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, pipeline
from typing_extensions import override

from runners.contracts.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from runners.contracts.tasks import Finding, TaskOptions, TaskRequest
from runners.tasks.program import Task


class TransformersPipeline(Task):
    """A task of `transformers.pipeline`; an input has at most `max_tokens` tokens."""

    name: str
    """The task's name, as in `PIPELINES`."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, max_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        make_pipeline: Any = pipeline  # its overloads accept only literal names
        self._pipeline = make_pipeline(self.name, model=model, tokenizer=tokenizer)

    @override
    def check(self, request: TaskRequest) -> None:
        self._check(request, self._tokenizer(request.text, verbose=False).input_ids)

    def _check(self, request: TaskRequest, token_ids: list[int]) -> None:
        if len(token_ids) > self._max_tokens:
            raise ContextLengthExceeded(
                f"has {len(token_ids)} tokens; at most {self._max_tokens} are allowed",
                field="inputs",
            )

    @override
    def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        keywords = self._keywords(requests[0].options)
        # Inputs of different lengths share a forward only if the model has a padding token.
        can_pad = None not in (self._tokenizer.pad_token_id, self._model.config.pad_token_id)
        outputs = self._pipeline(
            [request.text for request in requests],
            batch_size=len(requests) if can_pad else 1,
            **keywords,
        )
        # The fill-mask pipeline returns the output of a single text without a list around it.
        if self.name == "fill-mask" and len(requests) == 1:
            outputs = [outputs]
        return [self._findings(output) for output in outputs]

    @abstractmethod
    def _keywords(self, options: TaskOptions) -> dict[str, Any]:
        """The pipeline's keywords for the options of a request."""

    @abstractmethod
    def _findings(self, output: Any) -> list[Finding]:
        """The pipeline's output for one text, as findings."""


class FillMask(TransformersPipeline):
    """The likeliest tokens for each mask of a text."""

    name = "fill-mask"

    def __init__(self, model: PreTrainedModel, tokenizer: Any, max_tokens: int) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError("fill-mask needs a tokenizer with a mask token")
        super().__init__(model, tokenizer, max_tokens)
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()

    @override
    def _check(self, request: TaskRequest, token_ids: list[int]) -> None:
        super()._check(request, token_ids)
        if self._tokenizer.mask_token_id not in token_ids:
            raise InvalidRequest(f"has no {self._tokenizer.mask_token} to fill", field="inputs")
        for i, target in enumerate(request.options.targets or ()):
            if target not in self._vocabulary:
                raise InvalidRequest(
                    f"target {i} is not a token of the model's vocabulary", field="targets"
                )

    @override
    def _keywords(self, options: TaskOptions) -> dict[str, Any]:
        keywords: dict[str, Any] = {"targets": options.targets} if options.targets else {}
        if options.top_k is not None:
            keywords["top_k"] = min(options.top_k, self._model.config.get_text_config().vocab_size)
        return keywords

    @override
    def _findings(self, output: Any) -> list[Finding]:
        # The output for a text with a single mask has no list around it.
        masks = [output] if output and isinstance(output[0], dict) else output
        return [
            Finding(
                score=candidate["score"],
                text=candidate["token_str"],
                token_id=int(candidate["token"]),
                sequence=candidate["sequence"],
                mask=mask,
            )
            for mask, candidates in enumerate(masks)
            for candidate in candidates
        ]


class TokenClassification(TransformersPipeline):
    """A label for each token, or for each entity."""

    name = "token-classification"

    @override
    def _keywords(self, options: TaskOptions) -> dict[str, Any]:
        keywords = {
            "aggregation_strategy": options.aggregation_strategy,
            "ignore_labels": options.ignore_labels,
        }
        return {key: value for key, value in keywords.items() if value is not None}

    @override
    def _findings(self, output: Any) -> list[Finding]:
        return [
            Finding(
                score=float(entity["score"]),
                label=entity.get("entity_group", entity.get("entity")),
                text=entity["word"],
                index=_int_or_none(entity.get("index")),
                start=_int_or_none(entity["start"]),
                end=_int_or_none(entity["end"]),
            )
            for entity in output
        ]


class TextClassification(TransformersPipeline):
    """Labels of a text, the likeliest first."""

    name = "text-classification"

    @override
    def _keywords(self, options: TaskOptions) -> dict[str, Any]:
        keywords: dict[str, Any] = {"top_k": options.top_k or 1}
        if options.function_to_apply is not None:
            keywords["function_to_apply"] = options.function_to_apply
        return keywords

    @override
    def _findings(self, output: Any) -> list[Finding]:
        return [Finding(score=label["score"], label=label["label"]) for label in output]


def _int_or_none(number: Any) -> int | None:
    """A number of numpy or Python as an int."""
    return None if number is None else int(number)


PIPELINES: dict[str, type[TransformersPipeline]] = {
    task.name: task for task in (FillMask, TokenClassification, TextClassification)
}
