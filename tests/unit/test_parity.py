"""What is said of a model whose batched steps cannot be compared with its plain forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from runners.contracts.errors import ConfigError
from runners.text import parity
from runners.text.parity import ParityCheck


@pytest.fixture
def model(llama: Path) -> Any:
    """A model of this test alone."""
    return tf.AutoModelForCausalLM.from_pretrained(llama)


class LoneGroup:
    """A rank whose peers do not take part in what fails here."""

    is_leader = True

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_reduce_min(self, value: Any, *, timeout_s: float | None = None) -> Any:
        if timeout_s is not None:
            raise TimeoutError
        return value


def fail(*_: object, **__: object) -> torch.Tensor:
    raise ZeroDivisionError("integer division by zero\nand more")


def test_the_error_of_a_batched_step_is_quoted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ParityCheck(model)
    monkeypatch.setattr(parity, "_batched_logits", fail)
    assert check.find_layout() is None
    with pytest.raises(ConfigError) as caught:
        check.choose_layout()
    assert caught.value.message == (
        "LlamaForCausalLM cannot be batched continuously: its forward with a KV cache fails with "
        "ZeroDivisionError: integer division by zero"
    )


def test_ranks_that_do_not_agree_end_the_start(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on to another way of splitting would leave the others waiting."""
    group: Any = LoneGroup()
    check = ParityCheck(model, group)
    monkeypatch.setattr(parity, "_batched_logits", fail)
    with pytest.raises(ConfigError, match="it fails on one rank only: integer division by zero"):
        check.find_layout()


def test_a_plain_forward_that_fails_is_a_refusal(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ConfigError, match=r"^LlamaForCausalLM: its forward fails: ZeroDivision"):
        ParityCheck(model)


def test_weights_that_are_not_numbers_are_named(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ConfigError, match="gives logits that are NaN"):
        ParityCheck(model)
