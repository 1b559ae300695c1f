"""Linear layers that are split over ranks, as plain ones of this rank's part.

DeepSpeed's own do the same with more to do for each call, and neither our CPU kernels nor fusing
know them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, LmHeadLinearAllreduce
from torch import nn

AddUp = Callable[[torch.Tensor], object]


class RowSplitLinear(nn.Module):
    """`sum over ranks of x_part @ weight_part.T, + bias`; `[..., in / ranks]` to `[..., out]`.

    `begin`: where this rank's columns of a whole x begin; None if x is this rank's part already.
    """

    def __init__(
        self, part: nn.Linear, bias: torch.Tensor | None, add_up: AddUp, begin: int | None
    ) -> None:
        super().__init__()
        self.part = part
        self.bias = bias
        self._add_up = add_up
        self._begin = begin
        self._size = part.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The whole output, on every rank."""
        if self._begin is not None:
            x = x[..., self._begin : self._begin + self._size].contiguous()
        out: torch.Tensor = self.part(x)
        self._add_up(out)
        return out if self.bias is None else out + self.bias


def plain_splits(model: nn.Module, add_up: AddUp) -> None:
    """Replace the layers that `deepspeed.init_inference` put in, where they are of these kinds.

    `add_up` sums a tensor over the ranks, in place.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if (plain := _plain(layer, add_up)) is not None:
                setattr(parent, name, plain)


def _plain(layer: Any, add_up: AddUp) -> nn.Module | None:
    if type(layer) is LinearLayer and not layer.gather_output:
        return _linear(layer.weight, layer.bias)
    if type(layer) is LinearAllreduce:
        return RowSplitLinear(_linear(layer.weight, None), layer.bias, add_up, None)
    if type(layer) is LmHeadLinearAllreduce:
        begin = sum(layer._partition_sizes[: layer.tp_index])
        return RowSplitLinear(_linear(layer.weight, None), layer.bias, add_up, begin)
    return None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made
