"""The demo models' training text: a change of it would not match the committed weights."""

from __future__ import annotations

import hashlib
import random

from demo_models.image.world import random_scene
from demo_models.text import corpus


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def test_the_text_corpus_is_that_of_the_weights() -> None:
    rng = random.Random(0)
    chats = [repr(corpus.chat(rng)) for _ in range(500)]
    texts = [corpus.plain_text(rng) for _ in range(100)]
    held_out = [repr(chat) for chat in corpus.held_out_chats(rng, 100)]
    assert digest(chats) == "b32be230414ab3e4"
    assert digest(texts) == "a1b5472cf2acaa0d"
    assert digest(held_out) == "61cf08e45c8e6ad6"


def test_the_prompts_are_those_of_the_weights() -> None:
    rng = random.Random(0)
    assert digest([random_scene(rng).prompt(rng) for _ in range(500)]) == "b4542f79a11b78b0"
