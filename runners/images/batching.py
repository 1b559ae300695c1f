"""Calls of one model that wait at the same time, run as one along their first dimension.

What a call takes and gives may be nested in tuples, lists and mappings. Tensors whose first
dimension is the call's number of rows are joined; all else must be alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """One call of a model that a pipeline made."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def rows(self) -> int:
        """How many rows it computes: the first dimension of the first tensor that has one."""
        tensors = _tensors((self.args, self.kwargs))
        return next((tensor.shape[0] for tensor in tensors if tensor.ndim), 0)

    def run(self) -> Any:
        """The result, computed alone."""
        return self.function(*self.args, **self.kwargs)


def groups_of(calls: Sequence[Call]) -> list[list[int]]:
    """The calls that may be run together, as their indices, in order."""
    groups: list[tuple[Hashable, list[int]]] = []
    for index, call in enumerate(calls):
        key = (id(call.function), _form((call.args, call.kwargs), call.rows))
        for known, members in groups:
            if known == key and _shared_alike(calls[members[0]], call):
                members.append(index)
                break
        else:
            groups.append((key, [index]))
    return [members for _, members in groups]


def run_together(calls: Sequence[Call]) -> list[Any]:
    """The results of calls that `groups_of` put into one group."""
    if len(calls) == 1:
        return [calls[0].run()]
    rows = [call.rows for call in calls]
    args = _joined([call.args for call in calls], rows)
    kwargs = _joined([call.kwargs for call in calls], rows)
    result = calls[0].function(*args, **kwargs)
    return [_part(result, start, count, sum(rows)) for start, count in _spans(rows)]


def _spans(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for count in rows:
        yield start, count
        start += count


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _form(value: Any, rows: int) -> Hashable:
    """What two values must have in common for their calls to be run together."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            return ("scalar", str(value.device))
        shape = value.shape[1:] if value.shape[0] == rows else value.shape
        return (value.shape[0] == rows, tuple(shape), value.dtype, str(value.device))
    if isinstance(value, dict):
        return tuple((name, _form(item, rows)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return (type(value), *(_form(item, rows) for item in value))
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _shared_alike(one: Call, other: Call) -> bool:
    """Whether the tensors without rows (positions of patches, say) hold the same."""
    shared = [
        [t for t in _tensors((call.args, call.kwargs)) if t.ndim and t.shape[0] != call.rows]
        for call in (one, other)
    ]
    return all(a is b or torch.equal(a, b) for a, b in zip(*shared, strict=True))


def _joined(values: Sequence[Any], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if first.ndim == 0:  # a time step, which each may have another of
            spread = [v.expand(count) for v, count in zip(values, rows, strict=True)]
            return torch.cat(spread)
        return torch.cat(list(values)) if first.shape[0] == rows[0] else first
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values], rows) for name in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(items, rows) for items in zip(*values, strict=True))
    return first


def _part(value: Any, start: int, count: int, total: int) -> Any:
    """The rows of one call, of what all gave together."""
    if isinstance(value, torch.Tensor):
        has_rows = value.ndim and value.shape[0] == total
        return value[start : start + count] if has_rows else value
    if isinstance(value, dict):  # the outputs of transformers and diffusers are such, too
        return type(value)(**{k: _part(v, start, count, total) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_part(item, start, count, total) for item in value)
    return value
