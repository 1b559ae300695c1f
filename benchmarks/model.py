"""The model that every server serves: SmolLM-135M's shape, random float32 weights, 134.5M of them.

Speed depends on shapes, not on what was learnt. The rows of the (tied) embedding that stand for
end tokens, padding or bytes that are no text are zero, so greedy decoding never picks them: every
answer has exactly the length asked for, and every token is text, on every server.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cache import cached

SEED = 20240701
VOCABULARY, CONTEXT = 49_152, 8192
END = "<|endoftext|>"
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "initializer_range": 1 / 24,
    "rms_norm_eps": 1e-5,
}
KV_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 4
"""Layers, keys and values, KV heads, head dimension, bytes of a float32."""
LARGE_SHAPE = SHAPE | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
}
"""Llama 3.2 1B's shape, but for the vocabulary."""
EVEN_SHAPE = SHAPE | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""As large, but with heads that two ranks can share: 143M parameters."""
LARGE_KV_BYTES_PER_TOKEN = 16 * 2 * 8 * 64 * 2
WORDS = "words.json"


def model_folder() -> Path:
    """A Hugging Face model folder, made the first time."""
    return cached("model", lambda folder: write_model(folder, SHAPE, "float32"))


def even_model_folder() -> Path:
    """A model that two ranks can share, made the first time."""
    return cached("even-model", lambda folder: write_model(folder, EVEN_SHAPE, "float32"))


def large_model_folder() -> Path:
    """A model worth a GPU: a billion parameters in bfloat16, made the first time."""
    return cached("large-model", lambda folder: write_model(folder, LARGE_SHAPE, "bfloat16"))


def words(folder: Path) -> list[str]:
    """Words, each with a space before it, that are one token each, in any order and company."""
    found: list[str] = json.loads((folder / WORDS).read_text())
    return found


def write_model(folder: Path, shape: dict[str, Any], dtype: str) -> None:
    """Write weights, configuration, tokenizer and the list of one-token words."""
    import torch
    import transformers as tf

    tokenizer = _train_tokenizer()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    torch.manual_seed(SEED)
    config = tf.LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, **shape)
    model = tf.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    silent = [i for token, i in vocabulary.items() if not _is_text(token)]
    with torch.no_grad():
        model.get_input_embeddings().weight[silent + list(range(len(vocabulary), VOCABULARY))] = 0
    model.generation_config = tf.GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = sorted(token for token in vocabulary if re.fullmatch("Ġ[a-z]{3,12}", token))
    (folder / WORDS).write_text(json.dumps([" " + token[1:] for token in plain]))


def _train_tokenizer() -> Any:
    """GPT-2's kind of byte-level BPE, whose pre-tokenizer all peers know, as a fast tokenizer."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_standard_library(), trainer)
    return tf.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _standard_library() -> Iterator[str]:
    """The ASCII parts of Python's own sources: some ten million characters, always at hand."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield re.sub(r"[^\x20-\x7e\n]+", " ", path.read_text(encoding="utf-8", errors="ignore"))


def _is_text(token: str) -> bool:
    """Whether a byte-level token is printable ASCII, perhaps with spaces; `Ġ` is the space."""
    return token != END and re.fullmatch(r"[\x21-\x7eĠ]+", token) is not None
