"""What 8-bit weights cost: the trained demo model with and without them, token by token."""

from __future__ import annotations

import json
import random
from typing import Any

from benchmarks.fresh import arguments, fresh

CHATS = 200


def measure(threads: int) -> dict[str, Any]:
    """Agreement, mean KL divergence in nats and perplexities over the demo model's test chats."""
    found: dict[str, Any] = fresh("benchmarks.quality", threads)
    return found


def main() -> None:
    """In a process of its own: print the comparison as JSON."""
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
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32) for _ in range(2)
    )
    pack_linears(rounded, kernels, "int8")
    agreed = count = 0
    divergence = 0.0
    losses = [0.0, 0.0]
    chats = corpus.held_out_chats(random.Random("held out"), CHATS)  # noqa: S311 - no secret
    with torch.inference_mode():
        for chat in chats:
            ids, labels = chat_example(tokenizer, chat)
            learnt = torch.tensor(labels[1:]) >= 0
            wanted = torch.tensor(labels[1:])[learnt]
            first, second = (
                model(torch.tensor([ids])).logits[0, :-1][learnt].log_softmax(-1)
                for model in (exact, rounded)
            )
            agreed += int((first.argmax(-1) == second.argmax(-1)).sum())
            divergence += float((first.exp() * (first - second)).sum())
            for i, each in enumerate((first, second)):
                losses[i] -= float(each.gather(-1, wanted[:, None]).sum())
            count += len(wanted)
    perplexities = [torch.tensor(loss / count).exp().item() for loss in losses]
    print(
        json.dumps(
            {
                "tokens": count,
                "agreement": agreed / count,
                "divergence": divergence / count,
                "perplexity": perplexities[0],
                "perplexity_int8": perplexities[1],
            }
        )
    )


if __name__ == "__main__":
    main()
