"""The tasks that `transformers.pipeline` has: what it is given, and its answers as `Finding`s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, pipeline

from runners.contracts.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from runners.contracts.tasks import Finding, TaskOptions, TaskRequest


class Piped(ABC):
    """A `transformers` pipeline; see `program.Task`. `longest`: of an input, in tokens."""

    name: str

    def __init__(self, model: PreTrainedModel, tokenizer: Any, longest: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._longest = longest
        make: Any = pipeline  # whose overloads know no variable as the task
        self._pipeline = make(self.name, model=model, tokenizer=tokenizer)

    def check(self, request: TaskRequest) -> None:
        """Raises: ContextLengthExceeded if the text is longer than the model can take."""
        self._check(request, self._tokenizer(request.text, verbose=False).input_ids)

    def _check(self, request: TaskRequest, ids: list[int]) -> None:
        if len(ids) > self._longest:
            raise ContextLengthExceeded(
                f"has {len(ids)} tokens; at most {self._longest} are allowed",
                field="inputs",
            )

    def run(self, requests: Sequence[TaskRequest]) -> list[list[Finding]]:
        """One forward for all."""
        options = self._options(requests[0].options)
        # Without a padding token each input is a batch of its own.
        padded = None not in (self._tokenizer.pad_token_id, self._model.config.pad_token_id)
        found = self._pipeline(
            [request.text for request in requests],
            batch_size=len(requests) if padded else 1,
            **options,
        )
        # The fill-mask pipeline takes one text in a list for the text itself.
        found = [found] if self.name == "fill-mask" and len(requests) == 1 else found
        return [self._findings(each) for each in found]

    @abstractmethod
    def _options(self, options: TaskOptions) -> dict[str, Any]:
        """The pipeline's own keywords."""

    @abstractmethod
    def _findings(self, found: Any) -> list[Finding]:
        """What the pipeline found for one text."""


class FillMask(Piped):
    """The likeliest tokens in the place of each mask."""

    name = "fill-mask"

    def __init__(self, model: PreTrainedModel, tokenizer: Any, longest: int) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token, without which nothing is filled")
        super().__init__(model, tokenizer, longest)
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()

    def _check(self, request: TaskRequest, ids: list[int]) -> None:
        super()._check(request, ids)
        if self._tokenizer.mask_token_id not in ids:
            raise InvalidRequest(f"has no {self._tokenizer.mask_token} to fill", field="inputs")
        for i, target in enumerate(request.options.targets or ()):
            if target not in self._vocabulary:
                raise InvalidRequest(
                    f"target {i} is not a token of the model's vocabulary", field="targets"
                )

    def _options(self, options: TaskOptions) -> dict[str, Any]:
        given: dict[str, Any] = {"targets": options.targets} if options.targets else {}
        if options.top_k is not None:
            given["top_k"] = min(options.top_k, self._model.config.get_text_config().vocab_size)
        return given

    def _findings(self, found: Any) -> list[Finding]:
        masks = [found] if found and isinstance(found[0], dict) else found
        return [
            Finding(
                score=each["score"],
                text=each["token_str"],
                token_id=int(each["token"]),
                sequence=each["sequence"],
                mask=mask,
            )
            for mask, candidates in enumerate(masks)
            for each in candidates
        ]


class TokenClassification(Piped):
    """A label for each token, or for each entity."""

    name = "token-classification"

    def _options(self, options: TaskOptions) -> dict[str, Any]:
        given = {
            "aggregation_strategy": options.aggregation_strategy,
            "ignore_labels": options.ignore_labels,
        }
        return {key: value for key, value in given.items() if value is not None}

    def _findings(self, found: Any) -> list[Finding]:
        return [
            Finding(
                score=float(each["score"]),
                label=each.get("entity_group", each.get("entity")),
                text=each["word"],
                index=_whole(each.get("index")),
                start=_whole(each["start"]),
                end=_whole(each["end"]),
            )
            for each in found
        ]


class TextClassification(Piped):
    """Labels of a text, the best first."""

    name = "text-classification"

    def _options(self, options: TaskOptions) -> dict[str, Any]:
        function = options.function_to_apply
        return {"top_k": options.top_k or 1} | (
            {"function_to_apply": function} if function is not None else {}
        )

    def _findings(self, found: Any) -> list[Finding]:
        return [Finding(score=each["score"], label=each["label"]) for each in found]


def _whole(number: Any) -> int | None:
    return None if number is None else int(number)


PIPELINES: dict[str, type[Piped]] = {
    task.name: task for task in (FillMask, TokenClassification, TextClassification)
}
