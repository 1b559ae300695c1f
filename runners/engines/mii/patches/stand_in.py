"""StandInEngine: DeepSpeed FastGen's `InferenceEngineV2` on any device, over the paged engine.

It has the members that MII uses of that class, with their meanings.
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


class StandInEngine:
    """See the module. With several ranks each has one, and all are told the same."""

    def __init__(
        self, ragged: PagedEngine, config: RaggedInferenceEngineConfig, *, max_context: int
    ) -> None:
        self._ragged = ragged
        self._config = config
        self._lengths: dict[int, int] = {}
        self.max_context = min(max_context, config.state_manager.max_context)
        model_config = SimpleNamespace(max_seq_length=self.max_context)
        # Where MII looks for the length of the model's context.
        self._policy = SimpleNamespace(
            _checkpoint_engine=SimpleNamespace(model_config=model_config)
        )

    @property
    def total_tokens(self) -> int:
        """Tokens that the KV holds."""
        return self._ragged.total_tokens

    @property
    def free_blocks(self) -> torch.Tensor:
        """Blocks that can be had, `[1]`."""
        return torch.tensor([self._ragged.free_tokens // BLOCK_SIZE])

    def get_remaining_block_capacity(self, uid: int) -> int:
        """Tokens that still fit into the last block of a sequence."""
        return -self._lengths.get(uid, 0) % BLOCK_SIZE

    def query(self, uid: int, max_request_tokens: int, max_request_blocks: int) -> tuple[int, int]:
        """How many of so many tokens a sequence could be given, and the blocks they would take."""
        length = self._lengths.get(uid)
        if length is None:
            if len(self._lengths) >= self._config.state_manager.max_tracked_sequences:
                return 0, 0
            length = 0
        room = -length % BLOCK_SIZE + int(max_request_blocks) * BLOCK_SIZE
        tokens = min(max_request_tokens, room, self.max_context - length)
        return tokens, self._blocks(length, tokens)

    def can_schedule(self, uids: Iterable[int], lengths: Iterable[int]) -> SchedulingResult:
        """Whether one step could take so many tokens of these sequences."""
        manager = self._config.state_manager
        counts = dict(zip(uids, lengths, strict=True))
        known = {uid: self._lengths.get(uid, 0) for uid in counts}
        blocks = sum(self._blocks(known[uid], count) for uid, count in counts.items())
        if len(counts) > manager.max_ragged_sequence_count:
            return SchedulingResult.BatchSequenceLimitExceeded
        if any(known[uid] + count > self.max_context for uid, count in counts.items()):
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
        """Append tokens to sequences, in one step; float32 logits `[n, vocab]` of their last.

        Raises: SchedulingError, and nothing is computed.
        """
        uids, tokens = list(batch_uids), [each.tolist() for each in batch_tokens]
        if do_checks:
            result = self.can_schedule(uids, map(len, tokens))
            if result != SchedulingResult.Success:
                raise SchedulingError(result)
        for i, uid in enumerate(uids):
            if uid not in self._lengths:
                shared = self._ragged.open(uid, tokens[i])
                self._lengths[uid] = shared
                tokens[i] = tokens[i][shared:]
            if not self._ragged.extend(uid, len(tokens[i])):
                raise SchedulingError(SchedulingResult.KVCacheLimitExceeded)
        logits = self._ragged.put(uids, tokens)
        for uid, new in zip(uids, tokens, strict=True):
            self._lengths[uid] += len(new)
        return logits

    def flush(self, uid: int) -> None:
        """Forget a sequence, known or not."""
        self._lengths.pop(uid, None)
        self._ragged.flush(uid)

    def serialize(self, save_path: str) -> Any:
        """Raises: NotImplementedError: the weights are the model folder's own."""
        raise NotImplementedError("the weights lie in the model folder already")

    @staticmethod
    def _blocks(length: int, count: int) -> int:
        return -(-(length + count) // BLOCK_SIZE) - -(-length // BLOCK_SIZE)
