"""Streaming text equals decoded text, never breaks a character, never leaks a stop string."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from runners.text.detokenizer import Detokenizer
from runners.text.tokenization import PromptTokenizer
from tests.support.models import write_metaspace_tokenizer, write_tokenizer

TEXTS = [
    "hello world, the cat sat on the mat",
    "naïve café – 5 €",
    "狐狸住在森林里。",
    "🦊🐟 a fox 👩‍👩‍👧 and a fish 🇵🇹",
    "tabs\tand\nnew lines\n\n  and   spaces ",
    "",
]


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    {"byte-level": write_tokenizer, "metaspace": write_metaspace_tokenizer}[request.param](folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    deltas = []
    for token in ids:
        deltas.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    return [*deltas, detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_are_whole_characters_and_add_up(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    deltas = stream(Detokenizer(tokenizer), tokenizer(text).input_ids)
    assert "".join(deltas) == text
    assert not any("\ufffd" in d for d in deltas)


def test_broken_bytes_at_the_end_come_out_as_decode_shows_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer("ok 🦊").input_ids[:-1]
    deltas = stream(Detokenizer(tokenizer), ids)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert "".join(deltas).strip("\ufffd") == "ok "


def test_random_tokens_add_up_to_the_whole_decoded_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    # Byte pieces aside: a run of them that is no UTF-8 has no text but in hindsight.
    vocab = sorted(tokenizer.get_vocab().items())
    pieces = [i for t, i in vocab if i > 2 and not t.startswith("<0x")]
    dice = random.Random(7)
    for _ in range(1000):
        ids = dice.choices(pieces, k=dice.randrange(1, 40))
        assert "".join(stream(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", ["cat", " sat on", "c", "mat", "hello", "🐟", "世"])
def test_text_ends_before_the_stop_string(tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
    text = "hello the cat sat on 🦊🐟 the 世界 mat"
    detokenizer = Detokenizer(tokenizer, [stop, "never"])
    deltas = stream(detokenizer, tokenizer(text).input_ids)
    assert detokenizer.stopped
    assert "".join(deltas) == text[: text.index(stop)]


def test_beginnings_of_stop_strings_are_held_back_not_lost(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "aab aabaab aabaac"
    detokenizer = Detokenizer(tokenizer, ["aabaac"])
    so_far = ""
    for token in tokenizer(text).input_ids:
        so_far += detokenizer.add(token)
        assert text[: text.index("aabaac")].startswith(so_far)
    assert so_far + detokenizer.finish() == "aab aabaab "


def test_a_continuation_keeps_its_leading_space(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("hello the cat").input_ids
    split = len(tokenizer("hello").input_ids)
    detokenizer = Detokenizer(tokenizer, context=ids[:split])
    assert "".join(stream(detokenizer, ids[split:])) == " the cat"


def test_tokens_without_text_and_broken_bytes_do_not_pile_up(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    broken = tokenizer("🦊").input_ids[-2]
    assert tokenizer.eos_token_id is not None
    for token in (tokenizer.eos_token_id, broken):
        detokenizer = Detokenizer(tokenizer)
        for _ in range(200):
            detokenizer.add(token)
        assert len(detokenizer._ids) - detokenizer._start < 40


def test_a_stop_string_in_what_was_held_back_still_counts(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    detokenizer = Detokenizer(tokenizer, ["cat"])
    ids = [*tokenizer("the cat").input_ids, tokenizer("🦊").input_ids[-4]]
    text = "".join(detokenizer.add(i, may_stop=False) for i in ids[:-3])
    for token in ids[-3:]:
        text += detokenizer.add(token, may_stop=False)
    text += detokenizer.finish()
    assert "cat" not in text or not detokenizer.stopped


def test_the_earliest_of_several_stop_strings_wins(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer, ["mat", "sat"])
    deltas = stream(detokenizer, tokenizer("the cat sat on the mat").input_ids)
    assert "".join(deltas) == "the cat "


def test_stop_strings_do_not_count_before_the_minimum(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    detokenizer = Detokenizer(tokenizer, ["a"])
    ids = tokenizer("banana").input_ids
    text = "".join(detokenizer.add(t, may_stop=i >= 3) for i, t in enumerate(ids))
    assert detokenizer.stopped
    assert (text + detokenizer.finish()).count("a") >= 1


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_each_token_is_located_in_the_text(text: str, tmp_path: Path) -> None:
    """A piece of a character is where the character begins."""
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    token_bytes = PromptTokenizer(tokenizer, len(tokenizer), max_tokens=64).token_bytes
    detokenizer, before = Detokenizer(tokenizer), b""
    for token in tokenizer(text).input_ids:
        detokenizer.add(token)
        assert detokenizer.token_offset == len(before.decode(errors="ignore"))
        before += token_bytes(token)
    assert detokenizer.text_length == len(text)


def test_a_token_after_half_a_character_follows_its_replacement(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    half = tokenizer("é").input_ids[0]
    detokenizer = Detokenizer(tokenizer)
    offsets = []
    for token in [half, *tokenizer("ab").input_ids]:
        detokenizer.add(token)
        offsets.append(detokenizer.token_offset)
    assert offsets == [0, 1, 2]
