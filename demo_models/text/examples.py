"""Tokenizes chats and texts of the corpus into ids and labels, and batches them.

Called by the training, the evaluation and the quality benchmark.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch

from demo_models.text import corpus
from demo_models.text.tokenizer import CONTEXT_LENGTH

IGNORED = -100
BATCH_TOKENS = 1024
PLAIN_SHARE = 0.03
_POOL_SIZE = 400

Example = tuple[list[int], list[int]]


def chat_example(tokenizer: Any, messages: corpus.Messages) -> Example:
    """Token ids and labels of a chat; only the assistant's messages are training targets."""
    ids, labels = [tokenizer.bos_token_id], [IGNORED]
    for message in messages:
        content = [*tokenizer.encode(message["content"]), tokenizer.eos_token_id]
        is_target = message["role"] == "assistant"
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *content]
        labels += [IGNORED, *(content if is_target else [IGNORED] * len(content))]
    return ids[:CONTEXT_LENGTH], labels[:CONTEXT_LENGTH]


def text_example(tokenizer: Any, text: str, rng: random.Random) -> Example:
    """Token ids and labels of a plain text, half the time without the beginning marker.

    The tokenizer adds no marker to a raw prompt, but some servers do; both must work.
    """
    start = [tokenizer.bos_token_id] if rng.random() < 0.5 else []
    ids = [*start, *tokenizer.encode(text), tokenizer.eos_token_id]
    return ids, ids


def batches(tokenizer: Any, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of ids and labels, (n, width) each, of examples of similar length."""
    while True:
        pool = [
            text_example(tokenizer, corpus.plain_text(rng), rng)
            if rng.random() < PLAIN_SHARE
            else chat_example(tokenizer, corpus.chat(rng))
            for _ in range(_POOL_SIZE)
        ]
        groups = list(_groups(sorted(pool, key=lambda example: len(example[0]))))
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            # Attention is causal, so padding on the right needs no mask.
            yield (
                torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in group]),
            )


def _groups(examples: list[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if group and len(example[0]) * (len(group) + 1) > BATCH_TOKENS:
            yield group
            group = []
        group.append(example)
    yield group
