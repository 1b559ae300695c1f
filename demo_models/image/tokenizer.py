"""The tokenizer of the demo image model: CLIP's, with a vocabulary trained on its prompts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 32
VOCABULARY_SIZE = 768
_WORD_END = "</w>"


def train_tokenizer(prompts: Iterable[str], folder: Path) -> Any:
    """A `CLIPTokenizer` trained on the prompts, loaded from the files it leaves in `folder`.

    Every byte has a token, so that any text can be tokenized.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(prompts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    words = alphabet + [letter + _WORD_END for letter in alphabet]
    merges = [tuple(pair) for pair in trained["merges"]]
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), BEGIN, END])}
    folder.mkdir(parents=True, exist_ok=True)
    clip: Any = CLIPTokenizer
    clip(
        vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH, pad_token=END
    ).save_pretrained(folder)
    return clip.from_pretrained(folder)
