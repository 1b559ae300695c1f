"""Accuracy of 8-bit weights: the demo model in int8 against float32, token by token."""

from __future__ import annotations

import json
import random
from typing import Any

from benchmarks.isolated import arguments, run_isolated

CHATS = 200


def measure(threads: int) -> dict[str, Any]:
    """Agreement, mean KL divergence in nats and perplexities over the demo model's test chats."""
    comparison: dict[str, Any] = run_isolated("benchmarks.quality", threads)
    return comparison


def main() -> None:
    """Print the comparison as JSON, in the new process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from demo_models.text import corpus
    from demo_models.text.build import WEIGHTS
    from demo_models.text.examples import chat_example
    from runners.text.cpu import load_kernels
    from runners.text.cpu.linear import pack_linears

    torch.set_num_threads(arguments()["threads"])
    kernels = load_kernels()
    if kernels is None:
        raise SystemExit("the CPU kernels could not be compiled")
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    float32, int8 = (
        AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32) for _ in range(2)
    )
    pack_linears(int8, kernels, "int8")
    agreements = count = 0
    divergence = 0.0
    losses = [0.0, 0.0]
    chats = corpus.held_out_chats(random.Random("held out"), CHATS)  # noqa: S311 - not cryptographic
    with torch.inference_mode():
        for chat in chats:
            ids, labels = chat_example(tokenizer, chat)
            trained = torch.tensor(labels[1:]) >= 0
            targets = torch.tensor(labels[1:])[trained]
            first, second = (
                model(torch.tensor([ids])).logits[0, :-1][trained].log_softmax(-1)
                for model in (float32, int8)
            )
            agreements += int((first.argmax(-1) == second.argmax(-1)).sum())
            divergence += float((first.exp() * (first - second)).sum())
            for i, log_probs in enumerate((first, second)):
                losses[i] -= float(log_probs.gather(-1, targets[:, None]).sum())
            count += len(targets)
    perplexities = [torch.tensor(loss / count).exp().item() for loss in losses]
    print(
        json.dumps(
            {
                "tokens": count,
                "agreement": agreements / count,
                "divergence": divergence / count,
                "perplexity": perplexities[0],
                "perplexity_int8": perplexities[1],
            }
        )
    )


if __name__ == "__main__":
    main()
