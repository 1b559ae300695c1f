"""The handler that runs in TorchServe's worker: transformers' `generate` over a padded batch.

After TorchServe's Accelerate example. Nothing of this project can be imported here.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Handler:
    """Batches are made by TorchServe; one handler call generates one batch."""

    def initialize(self, context: Any) -> None:
        """Load the model."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        folder = os.environ["BENCH_MODEL"]
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        """Everybody's prompt is padded to the longest, everybody runs until the longest answer."""
        bodies = [_body(row) for row in data]
        batch = self._tokenizer(
            [body["prompt"] for body in bodies], padding=True, return_tensors="pt"
        )
        width = batch.input_ids.shape[1]
        with torch.inference_mode():
            generated = self._model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max(body["max_new_tokens"] for body in bodies),
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return [
            self._answer(ids[: body["max_new_tokens"]], int(mask.sum()))
            for body, ids, mask in zip(
                bodies, generated[:, width:], batch.attention_mask, strict=True
            )
        ]

    def _answer(self, ids: torch.Tensor, prompt_tokens: int) -> dict[str, Any]:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return {"text": text, "tokens": len(ids), "prompt_tokens": prompt_tokens}


def _body(row: dict[str, Any]) -> Any:
    body = row.get("body") or row.get("data")
    return json.loads(body) if isinstance(body, bytes | bytearray | str) else body
