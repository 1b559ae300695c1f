"""Several ranks that hold one model together and run the same steps.

Rank 0 has the scheduler, the block tables and the sampler. All that a forward depends on is in the
`StepPlan` that it hands to the others, so no rank can compute another step than the others do. A
plan travels as integers in one tensor of fixed size, and in a second where it is longer: nothing is
pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runners.contracts.text import ModelInfo
from runners.protocol.messages import HostMessage
from runners.rank.program import Occupancy
from runners.text.engine import Runs
from runners.text.paging.step import StepPlan

HEADER = 1024
"""Integers of the first tensor: its length, then as much of the plan as fits, which is all of it
for some dozens of running sequences."""


class Ranks:
    """What the ranks of a group tell each other, on the CPU. All make the same calls in order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.leads = dist.get_rank(group) == 0
        self._header = torch.zeros(HEADER, dtype=torch.int32)

    def smallest(self, value: int, *, patience: float | None = None) -> int:
        """The smallest of the ranks' values.

        Raises: TimeoutError if another rank does not ask after `patience` seconds.
        """
        number = torch.tensor(value)
        work: Any = dist.all_reduce(number, dist.ReduceOp.MIN, group=self._group, async_op=True)
        try:
            work.wait(timedelta(seconds=patience or 0))  # none waits as long as the group does
        except RuntimeError as error:
            if patience is None or "imed out" not in str(error):
                raise
            raise TimeoutError("the other ranks are elsewhere") from None
        return int(number)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor; the others' have its shape and type, and are overwritten."""
        dist.broadcast(tensor, 0, group=self._group)
        return tensor

    def send(self, plan: StepPlan | None) -> None:
        """Rank 0: tell the others what is run next, or, with None, that nothing is for now."""
        numbers = [] if plan is None else encode(plan)
        fits = numbers[: HEADER - 1]
        self._header[: len(fits) + 1] = torch.tensor([len(numbers), *fits], dtype=torch.int32)
        self.share(self._header)
        if len(numbers) > len(fits):
            self.share(torch.tensor(numbers[len(fits) :], dtype=torch.int32))

    def receive(self) -> StepPlan | None:
        """The others: what `send` was given."""
        length, *numbers = self.share(self._header).tolist()
        if length > len(numbers):
            rest = torch.empty(length - len(numbers), dtype=torch.int32)
            numbers += self.share(rest).tolist()
        return decode(numbers) if length else None


def encode(plan: StepPlan) -> list[int]:
    """A plan as integers: how many sequences, then of each the counts, past, tokens and table."""
    numbers = [len(plan.tokens)]
    for tokens, past, table in zip(plan.tokens, plan.past, plan.tables, strict=True):
        numbers += (len(tokens), len(table), past, *tokens, *table)
    return numbers


def decode(numbers: list[int]) -> StepPlan:
    """The plan that `encode` made integers of; what follows it is ignored."""
    left = iter(numbers)
    plan = StepPlan([], [], [])
    for _ in range(next(left)):
        count, blocks, past = next(left), next(left), next(left)
        plan.tokens.append(_take(left, count))
        plan.past.append(past)
        plan.tables.append(_take(left, blocks))
    return plan


def _take(numbers: Iterator[int], count: int) -> list[int]:
    return [next(numbers) for _ in range(count)]


class RankLost(Exception):
    """Another rank of the group ended or can not be reached."""


def tells_of_loss(error: Exception) -> bool:
    """Whether it is what a lost rank makes of a collective; gloo's errors have no type."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextmanager
def together() -> Iterator[None]:
    """Tell what a lost rank does to a collective from other errors. Raises: RankLost."""
    try:
        yield
    except RuntimeError as error:
        if tells_of_loss(error):
            raise RankLost(f"another rank of the group is lost: {error}") from error
        raise


class Leader:
    """Rank 0's share of the model: has the others run what it runs."""

    def __init__(self, model: Runs, ranks: Ranks) -> None:
        self._model = model
        self._ranks = ranks

    def run(self, plan: StepPlan) -> torch.Tensor:
        """See `engine.Runs`. Raises: RankLost."""
        with together():
            self._ranks.send(plan)
            return self._model.run(plan)

    def idle(self) -> None:
        """Let no rank wait so long that it takes this one for lost. Raises: RankLost."""
        with together():
            self._ranks.send(None)


class Follower:
    """The program of every rank but 0: runs what rank 0 runs."""

    def __init__(self, model: Runs, ranks: Ranks, info: ModelInfo) -> None:
        self.info = info
        self._model = model
        self._ranks = ranks

    def receive(self, message: HostMessage) -> None:
        """The host speaks to rank 0 only."""
        raise ValueError(f"unexpected {type(message).__name__}")

    def step(self) -> None:
        """Run the next step of rank 0, once there is one. Raises: RankLost."""
        with together():
            plan = self._ranks.receive()
            if plan is not None:
                self._model.run(plan)

    def occupancy(self) -> Occupancy:
        """Rank 0 knows."""
        return Occupancy()
