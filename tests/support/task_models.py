"""Tiny BERT-family models with a head for a task, with random weights."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from runners.contracts.tasks import PipelineTask

TEXT = (
    "the cat sat on a mat and looked at dog who lives in paris with anna she sings where does is "
    "it warm very good bad what home ##s ##ing"
)
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [
    *SPECIAL,
    *WORDS,
    *string.ascii_lowercase,
    *(f"##{c}" for c in string.ascii_lowercase),
]
POSITIONS = 64
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
HEADS: dict[PipelineTask, Any] = {
    "fill-mask": tf.AutoModelForMaskedLM,
    "token-classification": tf.AutoModelForTokenClassification,
    "question-answering": tf.AutoModelForQuestionAnswering,
    "text-classification": tf.AutoModelForSequenceClassification,
}
_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda: tf.BertConfig(**_SIZES, max_position_embeddings=POSITIONS, pad_token_id=0),
    # Its positions start after the padding token's id.
    "roberta": lambda: tf.RobertaConfig(
        **_SIZES, max_position_embeddings=POSITIONS + 1, pad_token_id=0, type_vocab_size=2
    ),
}


def write_wordpiece_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer like BERT's, over `VOCABULARY`."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **special
    ).save_pretrained(folder)


def write_task_model(task: PipelineTask, folder: Path, *, family: str = "bert") -> Path:
    """Write a model with a head for `task`; its weights are the same each time."""
    torch.manual_seed(len(task))
    config = CONFIGS[family]()
    if task in ("token-classification", "text-classification"):
        config.id2label = LABELS
        config.label2id = {label: i for i, label in LABELS.items()}
    model = HEADS[task].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # else all scores are nearly the same
    model.save_pretrained(folder)
    write_wordpiece_tokenizer(folder)
    return folder


def pipeline_of(task: str, folder: Path) -> Any:
    """The `transformers.pipeline` of a task."""
    make: Any = tf.pipeline
    return make(task, model=str(folder))
