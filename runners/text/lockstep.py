"""Ranks that hold one model together and run every step in lockstep.

Rank 0 has the scheduler, the block tables and the sampler, and broadcasts the `Batch` of each step
to the others. As a forward depends on nothing else, all ranks compute the same. A batch travels as
integers in a tensor of fixed size, and the rest of a long one in a second tensor: no pickle.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from runners.contracts.text import ModelInfo
from runners.protocol.messages import HostMessage
from runners.rank.program import Occupancy, RankProgram
from runners.text.engine import ModelRunner
from runners.text.paging.batch import Batch

HEADER = 1024
"""Integers of the first tensor: the length of the batch, then as much of it as fits, which is all
of it for some dozens of decoding sequences."""


class TPGroup:
    """The collectives of a tensor-parallel group, on the CPU. All ranks call the same in order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.is_leader = dist.get_rank(group) == 0
        self._header = torch.zeros(HEADER, dtype=torch.int32)

    def all_reduce_min(self, value: int, *, timeout_s: float | None = None) -> int:
        """The smallest value of all ranks.

        Raises: TimeoutError if another rank does not take part within `timeout_s`.
        """
        tensor = torch.tensor(value)
        work: Any = dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group, async_op=True)
        try:
            work.wait(timedelta(seconds=timeout_s or 0))  # 0 stands for the group's timeout
        except RuntimeError as error:
            if timeout_s is None or "imed out" not in str(error):
                raise
            raise TimeoutError("another rank does not take part") from None
        return int(tensor)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor; that of other ranks has the same shape and type, and is overwritten."""
        dist.broadcast(tensor, 0, group=self._group)
        return tensor

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rank 0's sampled tokens, on the device of the model."""
        dist.broadcast(tokens, 0)
        return tokens

    def send(self, batch: Batch | None) -> None:
        """In rank 0: send the next batch to the others, or None to keep the connection alive."""
        numbers = [] if batch is None else encode(batch)
        head = numbers[: HEADER - 1]
        self._header[: len(head) + 1] = torch.tensor([len(numbers), *head], dtype=torch.int32)
        self.broadcast(self._header)
        if len(numbers) > len(head):
            self.broadcast(torch.tensor(numbers[len(head) :], dtype=torch.int32))

    def receive(self) -> Batch | None:
        """In the other ranks: what rank 0 sends next."""
        length, *numbers = self.broadcast(self._header).tolist()
        if length > len(numbers):
            rest = torch.empty(length - len(numbers), dtype=torch.int32)
            numbers += self.broadcast(rest).tolist()
        return decode(numbers) if length else None


def encode(batch: Batch) -> list[int]:
    """A batch as integers: `shared` and the number of sequences, then per sequence the numbers of
    its tokens and blocks, its past, whether its logits are wanted, tokens, table."""
    numbers = [batch.shared, len(batch.tokens)]
    rows = zip(batch.tokens, batch.past, batch.block_tables, batch.wanted, strict=True)
    for tokens, past, table, wanted in rows:
        numbers += (len(tokens), len(table), past, wanted, *tokens, *table)
    return numbers


def decode(numbers: list[int]) -> Batch:
    """The batch that was encoded; what follows it is ignored."""
    rest = iter(numbers)
    batch = Batch([], [], [], [], shared=bool(next(rest)))
    for _ in range(next(rest)):
        count, blocks, past, wanted = (next(rest) for _ in range(4))
        batch.tokens.append(_take(rest, count))
        batch.past.append(past)
        batch.wanted.append(bool(wanted))
        batch.block_tables.append(array("i", _take(rest, blocks)))
    return batch


def _take(numbers: Iterator[int], count: int) -> list[int]:
    return [next(numbers) for _ in range(count)]


class RankLost(Exception):
    """Another rank of the group ended or cannot be reached."""


def is_rank_loss(error: Exception) -> bool:
    """Whether a collective failed because a rank is lost; gloo's errors have no type."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextmanager
def detect_rank_loss() -> Iterator[None]:
    """Raises: RankLost in place of the error that a lost rank causes in a collective."""
    try:
        yield
    except RuntimeError as error:
        if is_rank_loss(error):
            raise RankLost(f"another rank of the group is lost: {error}") from error
        raise


class Leader(ModelRunner):
    """In rank 0: has all ranks run a batch. Raises: RankLost."""

    def __init__(self, model: ModelRunner, group: TPGroup) -> None:
        self._model = model
        self._group = group

    @override
    def run(self, batch: Batch) -> torch.Tensor:
        with detect_rank_loss():
            self._group.send(batch)
            return self._model.run(batch)

    @override
    def feed(self, tokens: torch.Tensor) -> None:
        with detect_rank_loss():
            self._model.feed(self._group.share(tokens))

    @override
    def shrink(self) -> int | None:
        return None  # the other ranks may have had memory, and wait in a collective

    @override
    def idle(self) -> None:
        # The others would take a silent rank 0 for lost.
        with detect_rank_loss():
            self._group.send(None)
            self._model.idle()


class Follower(RankProgram):
    """The program of the other ranks: runs the batches of rank 0. Raises: RankLost."""

    def __init__(self, model: ModelRunner, group: TPGroup, info: ModelInfo) -> None:
        self._model = model
        self._group = group
        self._info = info

    @property
    @override
    def info(self) -> ModelInfo:
        return self._info

    @override
    def receive(self, message: HostMessage) -> None:
        # The host sends to rank 0 only.
        raise ValueError(f"unexpected {type(message).__name__}")

    @override
    def step(self) -> None:
        with detect_rank_loss():
            batch = self._group.receive()
            if batch is None:
                self._model.idle()
                return
            logits = self._model.run(batch)
            if batch.shared and len(logits):
                tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
                self._model.feed(self._group.share(tokens))

    @override
    def occupancy(self) -> Occupancy:
        # Rank 0 reports that of the group.
        return Occupancy()
