"""Model calls that run as one batch give the same results and errors as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from runners.images.batching import ModelCall, group_compatible, run_batched
from runners.images.executor import BatchExecutor, batched

batch_rows: list[int] = []


def model(x: torch.Tensor, time: torch.Tensor, *, extra: Any = None, flag: bool = False) -> Any:
    """A model of rows: shape (rows, width) and a time for all, or for each row."""
    batch_rows.append(len(x))
    shift = extra["shift"] if extra else 0
    y = x * (time.reshape(-1, 1) if time.ndim else time) + shift
    return (y, {"sum": y.sum(-1)}, BaseModelOutput(last_hidden_state=y), torch.arange(3), flag)


def call(rows: int, time: float, width: int = 4, **kwargs: Any) -> ModelCall:
    x = torch.arange(rows * width, dtype=torch.float32).reshape(rows, width) + time
    return ModelCall(model, (x, torch.tensor(time)), kwargs)


def test_rows_are_concatenated_and_sliced_again() -> None:
    calls = [
        call(2, 1.0, extra={"shift": torch.ones(2, 4)}),
        call(1, 5.0, extra={"shift": torch.zeros(1, 4)}),
        call(2, 7.0, extra={"shift": torch.full((2, 4), 3.0)}),
    ]
    assert group_compatible(calls) == [[0, 1, 2]]
    alone = [each.run() for each in calls]
    batch_rows.clear()
    for one, other in zip(alone, run_batched(calls), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1]["sum"], other[1]["sum"])
        assert torch.equal(one[2].last_hidden_state, other[2].last_hidden_state)
        assert torch.equal(one[3], other[3])
        assert one[4] is other[4]
    assert batch_rows == [5]


def test_calls_that_differ_in_more_than_rows_stay_apart() -> None:
    same, wider, flagged = call(2, 1.0), call(2, 1.0, width=5), call(2, 1.0, flag=True)
    assert group_compatible([same, wider, flagged, call(1, 2.0)]) == [[0, 3], [1], [2]]
    positions = [
        call(2, 1.0, extra={"shift": torch.full((4,), value)}) for value in (1.0, 1.0, 2.0)
    ]
    assert group_compatible(positions) == [[0, 1], [2]]
    positions[1].kwargs["extra"]["shift"].fill_(2.0)
    assert group_compatible(positions) == [[0], [1, 2]]
    generators = [call(2, 1.0, extra={"shift": 0, "by": torch.Generator()}) for _ in range(2)]
    assert group_compatible(generators) == [[0], [1]]


def test_coroutines_share_each_call_and_join_late() -> None:
    done: dict[str, float] = {}
    shared = batched(model)

    def work(name: str, steps: int) -> None:
        value = torch.ones(1, 4)
        for _ in range(steps):
            value = shared(value, torch.tensor(2.0))[0]
        done[name] = float(value[0, 0])

    executor = BatchExecutor()
    executor.start("a", lambda: work("a", 4))
    executor.step()
    executor.start("b", lambda: work("b", 2))
    batch_rows.clear()
    while len(executor):
        executor.step()
    assert done == {"a": 16.0, "b": 4.0}
    assert batch_rows == [2, 2, 1]


def test_an_aborted_coroutine_runs_no_further() -> None:
    ends: list[str] = []
    shared = batched(model)

    def work() -> None:
        try:
            while True:
                shared(torch.ones(1, 4), torch.tensor(1.0))
        finally:
            ends.append("ended")

    executor = BatchExecutor()
    executor.start("a", work)
    executor.step()
    executor.abort("a")
    executor.abort("a")
    assert (len(executor), ends) == (0, ["ended"])


def test_an_error_is_raised_only_in_the_coroutine_at_fault() -> None:
    def positive_only(x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise RuntimeError("negative")
        return x + 1

    shared, results = batched(positive_only), {}

    def work(name: str, value: float) -> None:
        try:
            results[name] = str(float(shared(torch.full((1, 2), value))[0, 0]))
        except RuntimeError as error:
            results[name] = str(error)

    executor = BatchExecutor()
    for name, value in (("a", 1.0), ("b", -1.0), ("c", 3.0)):
        executor.start(name, lambda name=name, value=value: work(name, value))  # type: ignore[misc]
    executor.step()
    assert results == {"a": "2.0", "b": "negative", "c": "4.0"}
    assert len(executor) == 0


def test_outside_a_coroutine_a_batched_function_runs_directly() -> None:
    x = torch.ones(1, 4)
    assert torch.equal(batched(model)(x, torch.tensor(3.0))[0], 3 * x)
    with pytest.raises(TypeError):
        batched(model)()
