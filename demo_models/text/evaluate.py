"""Measures a demo text model: `python -m demo_models.text.evaluate [DIR]`.

Counts the greedy answers that match exactly, and finds the smallest gap between the logits of the
two likeliest tokens.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from demo_models.text import corpus
from demo_models.text.build import WEIGHTS
from demo_models.text.examples import chat_example

MAX_NEW_TOKENS = 300


def answer(model: Any, tokenizer: Any, messages: corpus.Messages) -> tuple[str, float]:
    """The greedy answer, and the smallest logit gap between the two likeliest tokens of a step."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(
        **prompt,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    likeliest = torch.stack(output.logits).topk(2).values
    gap = (likeliest[..., 0] - likeliest[..., 1]).min().item()
    text = tokenizer.decode(
        output.sequences[0, prompt["input_ids"].shape[1] :],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return text, gap


def report(title: str, model: Any, tokenizer: Any, chats: list[corpus.Messages]) -> None:
    """Prints how many of the chats' last answers the model reproduces, and each other answer."""
    correct, gaps = 0, []
    for chat in chats:
        text, gap = answer(model, tokenizer, chat[:-1])
        gaps.append(gap)
        if text == chat[-1]["content"]:
            correct += 1
        else:
            print(f"  {chat[-2]['content']!r}: {text!r} instead of {chat[-1]['content']!r}")
    print(f"{title}: {correct} of {len(chats)} correct, smallest logit gap {min(gaps):.2f}")


def held_out_loss(model: Any, tokenizer: Any, chats: list[corpus.Messages]) -> float:
    """The mean loss per token over the answers."""
    total, count = 0.0, 0
    for chat in chats:
        ids, labels = chat_example(tokenizer, chat)
        targets = sum(label >= 0 for label in labels)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total, count = total + loss.item() * targets, count + targets
    return total / count


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Measures a demo text model.")
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument(
        "--count", type=int, default=200, help="number of held-out questions, and of chats"
    )
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model: Any = LlamaForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)

    rng = random.Random("held out")  # noqa: S311 (a test is no secret)
    questions = corpus.held_out_chats(rng, arguments.count)
    print(f"Loss on held-out questions: {held_out_loss(model, tokenizer, questions):.5f}")
    report("Held-out questions", model, tokenizer, questions)
    chats = [corpus.chat(rng, turns=rng.randint(1, 6)) for _ in range(arguments.count)]
    report("Unseen chats", model, tokenizer, chats)


if __name__ == "__main__":
    main()
