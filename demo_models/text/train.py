"""Trains the demo text model from scratch: `python -m demo_models.text.train`.

The result is the folder `weights` next to this file, which is part of the repository: using the
model needs no training. Takes about ten minutes on two free processor cores.
"""

import argparse
import random
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from demo_models.text import corpus
from demo_models.text.build import WEIGHTS
from demo_models.text.evaluate import answer, held_out_loss
from demo_models.text.examples import batches
from demo_models.text.tokenizer import CONTEXT_LENGTH, save_tokenizer, train_tokenizer

STEPS = 7200
PEAK_LEARNING_RATE = 1.5e-3
_TOKENIZER_CHATS = 4000
_SAMPLES = (
    "Where does Fenna live?",
    "Who is older, Tilda or Milo?",
    "Tell me a story about Otto.",
    "What is the capital of France?",
)


def new_model(tokenizer: Any) -> Any:
    """The untrained model: about two million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.03,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fit(model: Any, tokenizer: Any, steps: int, rng: random.Random) -> None:
    """Trains the model in place for a number of batches."""
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.97), weight_decay=0.05
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 30, steps)
    progress = tqdm(islice(batches(tokenizer, rng), steps), total=steps, unit="batch")
    for step, (ids, labels) in enumerate(progress):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes the model in half precision, which rounds the weights of `model` too."""
    # The model's generation config is marked as derived, and loading would rewrite it.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    model.float()
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Trains the demo text model from scratch.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the weights")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of batches")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus and the weights")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)  # noqa: S311 (a corpus is no secret)
    chats = [corpus.chat(rng) for _ in range(_TOKENIZER_CHATS)]
    tokenizer = train_tokenizer(message["content"] for chat in chats for message in chat)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    fit(model, tokenizer, arguments.steps, rng)
    save(model, tokenizer, arguments.out)

    model.eval()
    loss = held_out_loss(model, tokenizer, corpus.held_out_chats(rng, 300))
    print(f"Loss on held-out questions: {loss:.5f}")
    for question in _SAMPLES:
        text, _ = answer(model, tokenizer, [{"role": "user", "content": question}])
        print(f"> {question}\n{text}")


if __name__ == "__main__":
    main()
