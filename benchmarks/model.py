"""The model that every server serves: SmolLM-135M's shape with 134.5M random weights.

They are in float32, for one server in bfloat16.

Speed depends on the shapes, not on the values. The rows of the tied embedding for end tokens,
padding and bytes that are not text are zero, so greedy decoding never selects them: on every server
each output has exactly the requested length, and each token is text.
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
"""Layers, keys and values, KV heads, head dimension, bytes per float32."""
EVEN_SHAPE = SHAPE | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""Similar in size (143M parameters), with a number of heads that two ranks can split evenly."""
WORDS = "words.json"


def model_folder() -> Path:
    """The model's folder in Hugging Face format, written the first time."""
    return cached("model", lambda folder: write_model(folder, SHAPE, "float32"))


def bfloat16_model_folder() -> Path:
    """The folder of the same model with its weights in bfloat16, as most are published."""
    return cached("bfloat16-model", lambda folder: write_model(folder, SHAPE, "bfloat16"))


def even_model_folder() -> Path:
    """The folder of a model that two ranks can split, written the first time."""
    return cached("even-model", lambda folder: write_model(folder, EVEN_SHAPE, "float32"))


def words(folder: Path) -> list[str]:
    """Words with a leading space, each of which is one token in any context."""
    one_token_words: list[str] = json.loads((folder / WORDS).read_text())
    return one_token_words


def write_model(folder: Path, shape: dict[str, Any], dtype: str) -> None:
    """Write weights, configuration, tokenizer and the list of one-token words."""
    import torch
    import transformers as tf

    tokenizer = _train_tokenizer()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    torch.manual_seed(SEED)
    config = tf.LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, **shape)
    model = tf.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    zero_rows = [i for token, i in vocabulary.items() if not _is_text(token)]
    with torch.no_grad():
        model.get_input_embeddings().weight[
            zero_rows + list(range(len(vocabulary), VOCABULARY))
        ] = 0
    model.generation_config = tf.GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    candidates = sorted(token for token in vocabulary if re.fullmatch("Ġ[a-z]{3,12}", token))
    (folder / WORDS).write_text(json.dumps([" " + token[1:] for token in candidates]))


def _train_tokenizer() -> Any:
    """A fast tokenizer: byte-level BPE as in GPT-2, which all peers support."""
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
    """The ASCII text of Python's standard library: ten million characters, already installed."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield re.sub(r"[^\x20-\x7e\n]+", " ", path.read_text(encoding="utf-8", errors="ignore"))


def _is_text(token: str) -> bool:
    """Whether a byte-level token is printable ASCII; `Ġ` stands for the space."""
    return token != END and re.fullmatch(r"[\x21-\x7eĠ]+", token) is not None
