"""A device for tests, separate from the CPU as a GPU is, whose operators the CPU computes.

It has the name `meta`, because torch takes that everywhere. `FakeDevice` is active where tensors
are made on it or used.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
READING = {
    aten._linalg_check_errors,
    aten._local_scalar_dense,
    aten._unique2,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
}
"""Operators for which a GPU's host waits, because they need values."""


class _DeviceTensor(torch.Tensor):
    """A tensor on the device; `content` is what it is on the CPU."""

    content: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, content: torch.Tensor) -> _DeviceTensor:
        tensor: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=DEVICE,
        )
        tensor.content = content
        return tensor  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} outside of FakeDevice")


class FakeDevice(TorchDispatchMode):
    """Computes on the device, and records in `waits` where the host has to wait for it.

    Tensors of the CPU and the device do not mix, except for scalars of the CPU, as on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """The operators, with the line of the program that needs them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        operator = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(isinstance(tensor, _DeviceTensor) for tensor in tensors)
        on_host = [tensor for tensor in tensors if not isinstance(tensor, _DeviceTensor)]
        target = on_device
        if kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        if operator is aten._to_copy:
            if target != on_device and not kwargs.get("non_blocking"):
                self._record(func)
        elif operator is aten.copy_:
            if on_device and on_host:
                self._record(func)
        elif on_device:
            assert not any(tensor.ndim for tensor in on_host), f"{func} mixes devices: {_line()}"
            by_mask = operator is aten.index and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            if operator in READING or by_mask:
                self._record(func)
        known = {id(t.content): t for t in tensors if isinstance(t, _DeviceTensor)}
        result = func(*tree_map(_content, args), **tree_map(_content, kwargs))
        if operator is aten.copy_:
            return args[0]
        return tree_map(lambda leaf: _placed(leaf, known), result) if target else result

    def _record(self, func: Any) -> None:
        self.waits.append(f"{func} {_line()}")


def _content(leaf: Any) -> Any:
    return leaf.content if isinstance(leaf, _DeviceTensor) else leaf


def _placed(leaf: Any, known: dict[int, _DeviceTensor]) -> Any:
    """A result on the device: an argument itself where an operator has changed that."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return known[id(leaf)] if id(leaf) in known else _DeviceTensor(leaf)


def _line() -> str:
    """The innermost line of the program outside of torch and of this module."""
    frames = (f for f in reversed(traceback.extract_stack()) if f.filename != __file__)
    frame = next(f for f in frames if "/torch/" not in f.filename)
    return f"{frame.filename}:{frame.lineno}: {frame.line}"
