"""CPUInferenceEngine: DeepSpeed FastGen's `InferenceEngineV2` without CUDA, over the ragged engine.

It has the members of that class that MII uses, with the same meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.inference import RaggedInferenceEngineConfig
from deepspeed.inference.v2.scheduling_utils import SchedulingError, SchedulingResult

from runners.text.engine import PagedEngine
from runners.text.paging.blocks import BLOCK_SIZE


class CPUInferenceEngine:
    """One rank's engine; MII calls those of all ranks with the same arguments."""

    def __init__(
        self, engine: PagedEngine, config: RaggedInferenceEngineConfig, *, max_context: int
    ) -> None:
        self._engine = engine
        self._config = config
        self._lengths: dict[int, int] = {}
        self.max_context = min(max_context, config.state_manager.max_context)
        model_config = SimpleNamespace(max_seq_length=self.max_context)
        # MII reads the length of the model's context here.
        self._policy = SimpleNamespace(
            _checkpoint_engine=SimpleNamespace(model_config=model_config)
        )

    @property
    def total_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return self._engine.total_tokens

    @property
    def free_blocks(self) -> torch.Tensor:
        """Free KV blocks, `[1]`."""
        return torch.tensor([self._engine.free_tokens // BLOCK_SIZE])

    def get_remaining_block_capacity(self, uid: int) -> int:
        """Free tokens in the last KV block of a sequence."""
        return -self._lengths.get(uid, 0) % BLOCK_SIZE

    def query(self, uid: int, max_request_tokens: int, max_request_blocks: int) -> tuple[int, int]:
        """How many tokens a sequence can be extended by, within limits, and the blocks for them."""
        length = self._lengths.get(uid)
        if length is None:
            if len(self._lengths) >= self._config.state_manager.max_tracked_sequences:
                return 0, 0
            length = 0
        kv_room = -length % BLOCK_SIZE + int(max_request_blocks) * BLOCK_SIZE
        tokens = min(max_request_tokens, kv_room, self.max_context - length)
        return tokens, self._blocks(length, tokens)

    def can_schedule(self, uids: Iterable[int], lengths: Iterable[int]) -> SchedulingResult:
        """Whether one step can extend sequences by `lengths` tokens, or why it cannot."""
        manager = self._config.state_manager
        counts = dict(zip(uids, lengths, strict=True))
        current = {uid: self._lengths.get(uid, 0) for uid in counts}
        blocks = sum(self._blocks(current[uid], count) for uid, count in counts.items())
        if len(counts) > manager.max_ragged_sequence_count:
            return SchedulingResult.BatchSequenceLimitExceeded
        if any(current[uid] + count > self.max_context for uid, count in counts.items()):
            return SchedulingResult.SequenceTokenLimitExceeded
        if blocks > int(self.free_blocks[0]):
            return SchedulingResult.KVCacheLimitExceeded
        if len(self._lengths.keys() | counts.keys()) > manager.max_tracked_sequences:
            return SchedulingResult.EngineSequenceLimitExceeded
        if sum(counts.values()) > manager.max_ragged_batch_size:
            return SchedulingResult.BatchTokenLimitExceeded
        return SchedulingResult.Success

    def put(
        self,
        batch_uids: Iterable[int],
        batch_tokens: Iterable[torch.Tensor],
        do_checks: bool = True,
    ) -> torch.Tensor:
        """Append tokens to sequences in one step; float32 logits `[n, vocab]` of their last tokens.

        Raises: SchedulingError before anything is computed.
        """
        uids, tokens = list(batch_uids), [ids.tolist() for ids in batch_tokens]
        if do_checks:
            result = self.can_schedule(uids, map(len, tokens))
            if result != SchedulingResult.Success:
                raise SchedulingError(result)
        for i, uid in enumerate(uids):
            if uid not in self._lengths:
                cached = self._engine.open(uid, tokens[i])
                self._lengths[uid] = cached
                tokens[i] = tokens[i][cached:]
            if not self._engine.extend(uid, len(tokens[i])):
                raise SchedulingError(SchedulingResult.KVCacheLimitExceeded)
        logits = self._engine.put(uids, tokens)
        for uid, new in zip(uids, tokens, strict=True):
            self._lengths[uid] += len(new)
        return logits

    def flush(self, uid: int) -> None:
        """Free a sequence; unknown ones are ignored."""
        self._lengths.pop(uid, None)
        self._engine.flush(uid)

    def serialize(self, save_path: str) -> Any:
        """Raises: NotImplementedError."""
        raise NotImplementedError("the weights are in the model folder already")

    @staticmethod
    def _blocks(length: int, count: int) -> int:
        """KV blocks by which a sequence of `length` tokens grows with `count` more."""
        return -(-(length + count) // BLOCK_SIZE) - -(-length // BLOCK_SIZE)
