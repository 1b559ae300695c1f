"""Linear layers of a CPU model on our kernels, their weights packed for them.

Weights that were stored in 16 bits and are exactly representable there stay in 16 bits: arithmetic
is float32 either way, so the result is that of the float32 model at half the memory traffic. int8
keeps one scale per output column (symmetric, absolute maximum), weights only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from runners.text.cpu import Kernels
from runners.text.cpu.library import TYPES, LinearWeights

Quantization = Literal["int8"]


class PackedLinear(nn.Module):
    """`nn.Linear` with weights packed as the kernel reads them.

    `packed` is `[panels, in, width]`, zero beyond `out_features`; int8 comes with `scale` `[out]`.
    Takes and returns float32 `[..., in]`, `[..., out]`.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.shape[1], out_features
        self.scale, self.bias = scale, bias
        self.kernels = kernels
        self.hold(packed)

    def hold(self, packed: torch.Tensor) -> None:
        """Read the weights from here."""
        self.packed = packed
        pointers = (None if t is None else t.data_ptr() for t in (packed, self.scale, self.bias))
        sizes = self.in_features, self.out_features, TYPES.index(packed.dtype)
        self.weights = LinearWeights(*pointers, *sizes)
        """What the kernels need to know of it; valid as long as it lives and holds the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T + bias`. Raises: ValueError for an x of another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, the layer takes {self.in_features}")
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        out = torch.empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        self.kernels.linear(self.weights, x.data_ptr(), out.data_ptr(), rows)
        return out

    def unpacked(self) -> torch.Tensor:
        """The weight as float32 `[out, in]`; what was packed, but for int8's rounding."""
        panels, depth, width = self.packed.shape
        plain = self.packed.transpose(1, 2).reshape(panels * width, depth)[: self.out_features]
        return plain.float() if self.scale is None else plain.float() * self.scale[:, None]


def pack_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernels: Kernels,
    quantization: Quantization | None = None,
) -> PackedLinear:
    """A linear layer of weight `[out, in]` and bias `[out]`, both float32."""
    stored, scale = _compact(weight, quantization)
    if bias is not None:
        bias = bias.detach().clone()
    return PackedLinear(_pack(stored, kernels.panel_width), scale, bias, weight.shape[0], kernels)


def join(*layers: PackedLinear) -> PackedLinear | None:
    """The layers as one, their outputs one behind the other; None if their panels do not fit
    together. The layers go on working, on the same memory."""
    first = layers[0]
    width = first.packed.shape[2]
    for layer in layers:
        alike = layer.packed.dtype == first.packed.dtype and layer.in_features == first.in_features
        biased = (layer.bias is None) == (first.bias is None)
        if not alike or not biased or layer.out_features % width:
            return None

    def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    packed = torch.cat([layer.packed for layer in layers])
    parts = torch.split(packed, [len(layer.packed) for layer in layers])
    for layer, own in zip(layers, parts, strict=True):
        layer.hold(own)
    return PackedLinear(
        packed,
        joined([layer.scale for layer in layers]),
        joined([layer.bias for layer in layers]),
        sum(layer.out_features for layer in layers),
        first.kernels,
    )


def pack_linears(
    model: PreTrainedModel, kernels: Kernels, quantization: Quantization | None = None
) -> int:
    """Replace the linear layers that lie in float32 on the CPU; returns how many.

    Layers whose forward is wrapped (their weights brought in by a hook, or split over ranks) and
    subclasses of Linear are left alone. Whether the model is the same is for the caller to prove.
    """
    replaced = 0
    for parent, name in list(_linears(model)):
        # Held by nobody else, so that what is replaced is freed before the next is packed.
        setattr(parent, name, _packed(getattr(parent, name), kernels, quantization))
        replaced += 1
    if replaced:
        _let_go_of_files(model)
    return replaced


def _packed(
    layer: nn.Linear | Conv1D, kernels: Kernels, quantization: Quantization | None
) -> PackedLinear:
    weight = layer.weight.detach()
    if isinstance(layer, Conv1D):
        weight = weight.t()
    return pack_linear(weight, layer.bias, kernels, quantization)


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what is left, embeddings and norms: one view of a mapped weight file keeps all of it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def unpack_linears(model: PreTrainedModel) -> None:
    """Put ordinary linear layers back, with the weights that were packed."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear):
                plain = nn.Linear(1, 1)
                plain.out_features, plain.in_features = layer.out_features, layer.in_features
                plain.weight = nn.Parameter(layer.unpacked(), requires_grad=False)
                bias = layer.bias
                plain.register_parameter(
                    "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
                )
                setattr(parent, name, plain)


def _linears(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) not in (nn.Linear, Conv1D) or "forward" in vars(layer):
                continue
            if layer._forward_hooks or layer._forward_pre_hooks:
                continue
            weight = layer.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                yield parent, name


def _compact(
    weight: torch.Tensor, quantization: Quantization | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight in the fewest bits that keep it, and int8's scale per row."""
    if quantization == "int8":
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return (weight / scale[:, None]).round().to(torch.int8), scale.contiguous()
    for dtype in (torch.bfloat16, torch.float16):
        # Most weights that do not fit show it in their first row.
        if all(torch.equal(w.to(dtype).float(), w) for w in (weight[:1], weight)):
            return weight.to(dtype), None
    return weight, None


def _pack(weight: torch.Tensor, width: int) -> torch.Tensor:
    """`[out, in]` to panels `[ceil(out / width), in, width]`, zero beyond `out`."""
    out, depth = weight.shape
    panels = -(-out // width)
    packed = weight.new_zeros(panels, depth, width)
    whole = out // width
    packed[:whole] = weight[: whole * width].view(whole, width, depth).transpose(1, 2)
    if whole < panels:
        packed[whole, :, : out - whole * width] = weight[whole * width :].t()
    return packed
