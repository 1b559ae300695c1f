"""The handler in TorchServe's worker: transformers' `generate` over a padded batch.

Based on TorchServe's Accelerate example. This project cannot be imported here.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Handler:
    """Generates one batch per call; TorchServe forms the batches."""

    def initialize(self, context: Any) -> None:
        """Load the model."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        folder = os.environ["BENCH_MODEL"]
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        """Pad all prompts to the longest, and generate until the longest output is complete."""
        bodies = [_body(row) for row in data]
        batch = self._tokenizer(
            [body["prompt"] for body in bodies], padding=True, return_tensors="pt"
        )
        width = batch.input_ids.shape[1]
        with torch.inference_mode():
            sequences = self._model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max(body["max_new_tokens"] for body in bodies),
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return [
            self._response(ids[: body["max_new_tokens"]], int(mask.sum()))
            for body, ids, mask in zip(
                bodies, sequences[:, width:], batch.attention_mask, strict=True
            )
        ]

    def _response(self, ids: torch.Tensor, prompt_tokens: int) -> dict[str, Any]:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return {"text": text, "tokens": len(ids), "prompt_tokens": prompt_tokens}


def _body(row: dict[str, Any]) -> Any:
    body = row.get("body") or row.get("data")
    return json.loads(body) if isinstance(body, bytes | bytearray | str) else body
