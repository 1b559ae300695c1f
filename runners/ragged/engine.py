"""RaggedEngine: `put(uids, tokens) -> logits` over a stock Hugging Face causal LM.

The interface is that of DeepSpeed FastGen's `InferenceEngineV2` (put, flush), so one scheduler
drives every engine. Which forward the architecture gets, packed or padded, is decided by proof: at
start-up both are compared with the model's own plain forward, and a model that matches neither is
refused rather than served wrongly.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from transformers import PreTrainedModel

from runners.errors import ConfigError
from runners.ragged.attention import PACKED, Segment, segments
from runners.ragged.kv import SequenceKV
from runners.ragged.padded import PaddedCache
from runners.ragged.windows import narrow_windows

logger = logging.getLogger("triptych.ragged")

Path = Literal["packed", "padded"]


class Engine(Protocol):
    """The seam between a scheduler and whatever holds the model."""

    def reserve(self, uid: int, capacity: int) -> None:
        """Open a sequence that will hold at most `capacity` tokens."""
        ...

    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`, all in one step.

        Returns float32 logits `[len(uids), vocab]` of each sequence's last token, on the CPU.
        """
        ...

    def flush(self, uid: int) -> None:
        """Forget a sequence and free its KV. Unknown ids are ignored."""
        ...


class RaggedEngine:
    """See `Engine`. `path` fixes the forward; None chooses by proof. Raises: ConfigError."""

    def __init__(self, model: PreTrainedModel, *, path: Path | None = None) -> None:
        self.model: PreTrainedModel = model.train(False)
        self._sequences: dict[int, SequenceKV] = {}
        self.vocab_size = len(cast(torch.Tensor, model.get_input_embeddings().weight))
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_rows = "logits_to_keep" in parameters
        # With every layer on disk `model.device` is meta: inputs then start on the CPU.
        self._device = torch.device("cpu") if model.device.type == "meta" else model.device
        self.path: Path = path or self._choose_path()

    def reserve(self, uid: int, capacity: int) -> None:
        """Open a sequence that will hold at most `capacity` tokens."""
        self._sequences[uid] = SequenceKV(capacity)

    def flush(self, uid: int) -> None:
        """Forget a sequence and free its KV."""
        self._sequences.pop(uid, None)

    @torch.inference_mode()
    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`; returns last-token logits `[n, vocab]`."""
        kvs = [self._sequences[uid] for uid in uids]
        run = self._put_packed if self.path == "packed" else self._put_padded
        logits = run(kvs, tokens)
        for kv, new in zip(kvs, tokens, strict=True):
            kv.length += len(new)
        return logits.float().cpu()

    def bytes_per_token(self, uid: int) -> dict[torch.device, int]:
        """Bytes of KV that one token of a sequence takes on each device."""
        return self._sequences[uid].bytes_per_token()

    def _put_packed(
        self, kvs: Sequence[SequenceKV], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        rows: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for kv, new in zip(kvs, tokens, strict=True):
            rows.append(Segment(kv, len(ids), len(new)))
            positions += range(kv.length, kv.length + len(new))
            ids += new
            last.append(len(ids) - 1)
        context = segments.set(rows)
        try:
            return self._forward([ids], last, position_ids=[positions], use_cache=False)[0]
        finally:
            segments.reset(context)

    def _put_padded(
        self, kvs: Sequence[SequenceKV], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Single tokens run as one batch; each longer chunk runs alone, without padding."""
        order = range(len(kvs))
        singles = [i for i in order if len(tokens[i]) == 1]
        batches = [singles] if singles else []
        batches += [[i] for i in order if len(tokens[i]) > 1]
        logits: dict[int, torch.Tensor] = {}
        for batch in batches:
            cache = PaddedCache([kvs[i] for i in batch], len(tokens[batch[0]]))
            out = self._forward(
                [list(tokens[i]) for i in batch],
                [len(tokens[batch[0]]) - 1],
                position_ids=[
                    list(range(kvs[i].length, kvs[i].length + len(tokens[i]))) for i in batch
                ],
                attention_mask=cache.mask().to(self._device),
                past_key_values=cache,
                use_cache=True,
            )
            logits |= zip(batch, out[:, -1], strict=True)
        return torch.stack([logits[i] for i in order])

    def _forward(
        self,
        ids: list[list[int]],
        rows: list[int],
        *,
        position_ids: list[list[int]],
        **kwargs: object,
    ) -> torch.Tensor:
        """Logits `[batch, len(rows), vocab]` of the asked-for rows."""
        if self._takes_positions:
            kwargs["position_ids"] = torch.tensor(position_ids, device=self._device)
        wanted = torch.tensor(rows, device=self._device)
        if self._takes_rows:
            kwargs["logits_to_keep"] = wanted
        out = self.model(input_ids=torch.tensor(ids, device=self._device), **kwargs).logits
        logits: torch.Tensor = out if self._takes_rows else out[:, wanted.to(out.device)]
        return logits

    def _choose_path(self) -> Path:
        # Windows wider than the probe would prove nothing about how a path treats them.
        with narrow_windows(self.model):
            return self._prove_path()

    def _prove_path(self) -> Path:
        reference = self._reference()
        usual = self.model.config._attn_implementation
        if getattr(self.model, "_supports_attention_backend", False):
            self.model.set_attn_implementation(PACKED)
            if self._matches("packed", reference):
                return "packed"
            self.model.set_attn_implementation(usual)
        if self._matches("padded", reference):
            return "padded"
        raise ConfigError(
            f"{type(self.model).__name__} can not be batched continuously: its logits with a KV "
            "cache differ from its own plain forward"
        )

    def _probe(self) -> list[list[int]]:
        return [[(7 * i + 3 + k) % self.vocab_size for i in range(13 - 4 * k)] for k in range(2)]

    @torch.inference_mode()
    def _reference(self) -> torch.Tensor:
        """Last-token logits of two short prompts by the model's own forward, without any cache."""
        return torch.cat(
            [
                self.model(input_ids=torch.tensor([ids], device=self._device), use_cache=False)
                .logits[:, -1]
                .float()
                .cpu()
                for ids in self._probe()
            ]
        )

    def _matches(self, path: Path, reference: torch.Tensor) -> bool:
        """Whether chunked, mixed steps over the probe end in the reference's logits."""
        self.path = path
        first, second = self._probe()
        for uid, ids in ((-1, first), (-2, second)):
            self.reserve(uid, len(ids))
        try:
            self.put([-1], [first[:4]])
            self.put([-1, -2], [first[4:-1], second[:-1]])
            ours = self.put([-1, -2], [first[-1:], second[-1:]])
            # Half precision differs in its last bits between batch shapes; wrong maths by more.
            exact = self.model.dtype in (torch.float32, torch.float64)
            spread = float(reference.std())
            return bool(
                torch.isfinite(ours).all()
                and (ours - reference).abs().max() <= (1e-3 if exact else 0.1) * max(spread, 1e-3)
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an architecture trips over, this is not its path
            logger.info("%s on the %s path: %s", type(self.model).__name__, path, error)
            return False
        finally:
            self.flush(-1)
            self.flush(-2)
