"""What a model's files say about generation, and what is said about the rest."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import transformers as tf

from runners.config.mii import GenerateSection
from runners.contracts.errors import ConfigError, InvalidRequest
from runners.contracts.text import SamplingParams
from runners.engines.mii.defaults import mii_defaults
from runners.hf.models import (
    context_length,
    end_token_ids,
    sampling_defaults,
    warn_about_ignored,
)
from runners.text.requests import DEFAULT_NEW_TOKENS, check_logit_bias, token_limit


class Tokenizer:
    """The one attribute that is read."""

    def __init__(self, eos_token_id: int | None) -> None:
        self.eos_token_id = eos_token_id


@pytest.mark.parametrize(
    ("generation", "tokenizer", "ends"),
    [
        (0, 2, {0, 2}),
        ([0, 1], 1, {0, 1}),
        (None, 2, {2}),
        (0, None, {0}),
        (None, None, set()),
        ([0, 99], 100, {0}),
    ],
)
def test_the_end_tokens_are_those_of_both_files(
    generation: Any, tokenizer: int | None, ends: set[int]
) -> None:
    config = tf.GenerationConfig(eos_token_id=generation)
    assert end_token_ids(config, Tokenizer(tokenizer), 99) == ends
    if generation is None:
        assert end_token_ids(None, Tokenizer(tokenizer), 99) == ends


def test_each_key_of_the_generation_config_is_honoured_or_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tf.GenerationConfig(
        do_sample=True,
        temperature=0.6,
        min_p=0.05,
        eos_token_id=1,
        pad_token_id=0,
        max_new_tokens=300,
        stop_strings=["###", "User:"],
        num_beams=4,
        num_return_sequences=1,
        length_penalty=1.0,
        max_length=4096,
        no_repeat_ngram_size=2,
        penalty_alpha=0.6,
        a_key_of_the_future=3,
    )
    with caplog.at_level(logging.WARNING):
        warn_about_ignored(config)
        warn_about_ignored(None)
    [record] = [record for record in caplog.records if record.name == "triptych.hf"]
    ignored = record.getMessage().partition("ignored keys: ")[2].split(", ")
    assert set(ignored) == {
        *("num_beams", "max_length", "no_repeat_ngram_size", "penalty_alpha"),
        "a_key_of_the_future",
    }
    defaults = sampling_defaults(config)
    assert (defaults.temperature, defaults.min_p, defaults.max_new_tokens) == (0.6, 0.05, 300)
    config.do_sample = False
    assert sampling_defaults(config).min_p == 0.0
    assert defaults.stop == ("###", "User:")
    assert sampling_defaults(tf.GenerationConfig(stop_strings="END")).stop == ("END",)


def test_neutral_values_of_old_files_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    neutral = tf.GenerationConfig._get_default_generation_params()
    with caplog.at_level(logging.WARNING):
        warn_about_ignored(tf.GenerationConfig(**neutral))
    assert not [record for record in caplog.records if record.name == "triptych.hf"]


def test_a_negative_top_k_keeps_all() -> None:
    assert sampling_defaults(tf.GenerationConfig(do_sample=True, top_k=-1)).top_k == 0


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "top_p": [0.5]}, "top_p"),
        ({"do_sample": True, "top_k": 1.5}, "top_k"),
        ({"do_sample": True, "min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop_strings": [None]}, "stop.0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    config = tf.GenerationConfig()
    config.update(**values)
    with pytest.raises(ConfigError) as caught:
        sampling_defaults(config)
    assert caught.value.message.startswith(f"generation_config.json: {field}: ")


def test_an_end_token_is_an_id() -> None:
    config = tf.GenerationConfig()
    config.eos_token_id = ["</s>"]
    with pytest.raises(ConfigError, match="eos_token_id"):
        end_token_ids(config, Tokenizer(None), 99)


def test_a_section_for_mii_replaces_the_stop_strings_only_if_it_has_some() -> None:
    generation = tf.GenerationConfig(stop_strings=["###"])
    assert mii_defaults(GenerateSection(), generation).stop == ("###",)
    assert mii_defaults(GenerateSection(stop=["END"]), generation).stop == ("END",)


@pytest.mark.parametrize(
    ("params", "default", "limit"),
    [
        ({}, None, DEFAULT_NEW_TOKENS),
        ({"fill_context": True}, None, 900),
        ({"fill_context": True}, 300, 300),
        ({"default_new_tokens": 16, "fill_context": False}, 300, 16),
        ({"max_new_tokens": 5, "fill_context": True}, 300, 5),
    ],
)
def test_without_a_limit_a_chat_fills_the_context(
    params: dict[str, Any], default: int | None, limit: int
) -> None:
    sampling = SamplingParams(**params)
    found = token_limit(
        sampling, 100, max_model_len=1000, min_new_tokens=0, default_new_tokens=default
    )
    assert found == limit


@pytest.mark.parametrize("token", [-1, 99, 2**40])
def test_a_bias_is_that_of_a_token_of_the_vocabulary(token: int) -> None:
    check_logit_bias(SamplingParams(), 99)
    check_logit_bias(SamplingParams(logit_bias={0: 1.0, 98: 1.0}), 99)
    with pytest.raises(InvalidRequest, match=rf"token id {token} .* \(0 to 98\)") as caught:
        check_logit_bias(SamplingParams(logit_bias={5: 1.0, token: 1.0}), 99)
    assert caught.value.field == "logit_bias"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "dynamic", "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, 512),
        ({"a": {"rope_type": "default"}, "b": {"rope_type": "default"}}, 512),
        (
            {
                "sliding": {"rope_type": "default"},
                "full": {"rope_type": "longrope", "original_max_position_embeddings": 64},
            },
            64,
        ),
        (None, 512),
    ],
)
def test_frequencies_that_depend_on_the_batch_limit_the_context(
    rope: dict[str, Any] | None, expected: int
) -> None:
    config = tf.LlamaConfig(max_position_embeddings=512)
    config.rope_parameters = rope
    assert context_length(config) == expected
