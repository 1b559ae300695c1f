"""Tokens per second of a set of sequences, and what the device allows at most.

A decode step of c sequences reads all weights (of the input embedding only c rows) and the KV of
all sequences once, and needs two operations per weight and sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What the device was measured to do."""

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Cost:
    """What one decode step of a model needs."""

    weight_bytes: int
    weights: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, model: Any) -> Cost:
        """The cost of a decoder with separate input and output embeddings."""
        embedding = model.get_input_embeddings().weight
        output = model.get_output_embeddings().weight
        tied = embedding.data_ptr() == output.data_ptr()
        unread = 0 if tied else embedding.numel()
        parameters = {p.data_ptr(): p for p in model.parameters()}.values()
        weights = sum(p.numel() for p in parameters) - unread
        config = model.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
        size = embedding.element_size()
        return cls(weights * size, weights, kv * size)

    def bandwidth_share(self, rate: float, count: int, context: float, limits: Limits) -> float:
        """The share of the memory bandwidth that `rate` tokens per second need."""
        step = self.weight_bytes + count * context * self.kv_bytes_per_token
        return rate / count * step / limits.bytes_per_second

    def operations_share(self, rate: float, limits: Limits) -> float:
        """The share of the operations that `rate` tokens per second need; without attention."""
        return rate * 2 * self.weights / limits.operations_per_second


@dataclass(frozen=True)
class Round:
    """When the tokens of each sequence came, from `start` on, on one clock."""

    start: float
    times: Sequence[Sequence[float]]

    @property
    def total_rate(self) -> float:
        """Tokens per second from the submission to the last token."""
        tokens = sum(map(len, self.times))
        return tokens / (max(t[-1] for t in self.times) - self.start)

    @property
    def decode_rate(self) -> float:
        """Tokens per second while all sequences decode: no prompt is computed, none has ended."""
        begin = max(t[0] for t in self.times)
        end = min(t[-1] for t in self.times)
        tokens = sum(begin < time <= end for times in self.times for time in times)
        return tokens / (end - begin) if end > begin else float("nan")

    @property
    def first_token(self) -> float:
        """Median seconds to the first token."""
        return median(times[0] - self.start for times in self.times)


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians of rounds, and all values of the total rate."""
    return {
        "tokens_per_second": median(r.total_rate for r in rounds),
        "decode_tokens_per_second": median(r.decode_rate for r in rounds),
        "ttft_s": median(r.first_token for r in rounds),
        "rounds": [r.total_rate for r in rounds],
    }
