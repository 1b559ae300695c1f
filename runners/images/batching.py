"""Pending calls of one model, run as one batch along the first dimension of their tensors.

Arguments and results may be nested in anything that torch's pytree flattens: tuples, lists,
dictionaries and the output classes of diffusers and transformers. Tensors whose first dimension is
the call's number of rows are concatenated; all other arguments must be equal.

Called by the executor, in rank processes.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

_contents: MutableMapping[torch.Tensor, tuple[int, bytes]] = WeakTensorKeyDictionary()
"""The version and the bytes of tensors without rows, so that each is read from its device once."""


@dataclass(frozen=True)
class ModelCall:
    """One call that a pipeline made of one of its models."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def flattened(self) -> tuple[list[Any], TreeSpec]:
        """The arguments as one list, and how they are nested."""
        return tree_flatten((self.args, self.kwargs))

    @property
    def rows(self) -> int:
        """Number of rows to compute: the first dimension of the first tensor that has one."""
        leaves, _ = self.flattened
        sizes = (leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)
        return next(sizes, 0)

    def run(self) -> Any:
        """The result of the call alone."""
        return self.function(*self.args, **self.kwargs)


def group_compatible(calls: Sequence[ModelCall]) -> list[list[int]]:
    """Groups of calls that can run as one batch: the indices of each group, in order."""
    if len(calls) == 1:
        return [[0]]
    groups: list[tuple[tuple[object, ...], list[int]]] = []
    for index, call in enumerate(calls):
        key = _batch_key(call)
        for group_key, members in groups:
            if group_key == key:
                members.append(index)
                break
        else:
            groups.append((key, [index]))
    return [members for _, members in groups]


def run_batched(calls: Sequence[ModelCall]) -> list[Any]:
    """The results of the calls of one group of `group_compatible`, computed in one forward."""
    if len(calls) == 1:
        return [calls[0].run()]
    rows = [call.rows for call in calls]
    columns = zip(*(call.flattened[0] for call in calls), strict=True)
    arguments = [_concatenate(column, rows) for column in columns]
    args, kwargs = tree_unflatten(arguments, calls[0].flattened[1])
    leaves, structure = tree_flatten(calls[0].function(*args, **kwargs))
    ends = list(accumulate(rows))
    return [
        tree_unflatten([_slice(leaf, end - count, end, ends[-1]) for leaf in leaves], structure)
        for count, end in zip(rows, ends, strict=True)
    ]


def _batch_key(call: ModelCall) -> tuple[object, ...]:
    """What the calls of one batch have in common, apart from the values of their rows."""
    leaves, structure = call.flattened
    return (id(call.function), structure, *(_leaf_key(leaf, call.rows) for leaf in leaves))


def _leaf_key(leaf: Any, rows: int) -> object:
    if isinstance(leaf, torch.Tensor):
        if leaf.ndim == 0:
            return ("scalar", str(leaf.device))
        if leaf.shape[0] == rows:
            return (leaf.shape[1:], leaf.dtype, str(leaf.device))
        return (_content(leaf), leaf.shape, leaf.dtype, str(leaf.device))
    by_value = isinstance(leaf, (int, float, str, bool, type(None), torch.Size))
    return leaf if by_value else id(leaf)


def _content(tensor: torch.Tensor) -> bytes:
    """The values of a tensor without rows, such as the positions of patches.

    A pipeline passes the same tensor in each step. To compare it on the device in each step would
    have the host wait for the device every time.
    """
    known = _contents.get(tensor)
    if known is None or known[0] != tensor._version:
        content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        known = _contents[tensor] = (tensor._version, content)
    return known[1]


def _concatenate(values: Sequence[Any], rows: Sequence[int]) -> Any:
    """One argument of several calls as an argument of their batch."""
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return first
    if first.ndim == 0:  # a time step, which may differ between the calls
        return torch.cat([v.expand(count) for v, count in zip(values, rows, strict=True)])
    return torch.cat(list(values)) if first.shape[0] == rows[0] else first


def _slice(value: Any, start: int, end: int, total: int) -> Any:
    """The rows of one call in an output of its batch."""
    has_rows = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == total
    return value[start:end] if has_rows else value
