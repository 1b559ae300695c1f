"""Linear layers that are split over ranks, as plain PyTorch layers over this rank's share.

DeepSpeed's own layers compute the same with more work per call, and neither Triptych's CPU kernels
nor its module fusing support them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, LmHeadLinearAllreduce
from torch import nn

AllReduce = Callable[[torch.Tensor], object]
"""Sums a tensor over the ranks, in place."""


class RowSplitLinear(nn.Module):
    """A linear layer whose input features are split over the ranks.

    Computes `sum over ranks of x_share @ weight_share.T, + bias`, on every rank. `begin`: where
    this rank's features begin in the whole x; None if x is this rank's share already.
    """

    def __init__(
        self, share: nn.Linear, bias: torch.Tensor | None, all_reduce: AllReduce, begin: int | None
    ) -> None:
        super().__init__()
        self.share = share
        self.bias = bias
        self._all_reduce = all_reduce
        self._begin = begin
        self._size = share.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in / ranks]`, or `[..., in]` with `begin`, to `[..., out]`."""
        if self._begin is not None:
            x = x[..., self._begin : self._begin + self._size].contiguous()
        out: torch.Tensor = self.share(x)
        self._all_reduce(out)
        return out if self.bias is None else out + self.bias


def replace_split_layers(model: nn.Module, all_reduce: AllReduce) -> None:
    """Replace DeepSpeed's split layers in a model by plain ones, in place.

    Layers that `deepspeed.init_inference` does not make by default stay as they are.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if (replacement := _plain_layer(layer, all_reduce)) is not None:
                setattr(parent, name, replacement)


def _plain_layer(layer: Any, all_reduce: AllReduce) -> nn.Module | None:
    if type(layer) is LinearLayer and not layer.gather_output:
        return _linear(layer.weight, layer.bias)
    if type(layer) is LinearAllreduce:
        return RowSplitLinear(_linear(layer.weight, None), layer.bias, all_reduce, None)
    if type(layer) is LmHeadLinearAllreduce:
        begin = sum(layer._partition_sizes[: layer.tp_index])
        return RowSplitLinear(_linear(layer.weight, None), layer.bias, all_reduce, begin)
    return None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
