"""Linear layers on the CPU kernels, with their weights packed in the layout that these read.

16-bit weights, and those whose values fit 16 bits, are stored in 16 bits. Arithmetic is in float32
either way, so the result is that of the float32 model at half the memory traffic. int8 has one
scale per output (symmetric, absolute maximum) and applies to weights only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from runners.hf.dtypes import HALF, cast_to_float32, computes_in_float32, remove_hooks
from runners.protocol.process import give_back_memory
from runners.text.cpu import Kernels
from runners.text.cpu.library import WEIGHT_TYPES, LinearWeights

Quantization = Literal["int8"]


class PackedLinear(nn.Module):
    """`nn.Linear` with packed weights, from float32 `[..., in]` to float32 `[..., out]`.

    `packed` is `[panels, in, width]`, zero beyond `out_features`; for int8, `scale` is `[out]`.
    Raises: ValueError for an input of another size.
    """

    weights: LinearWeights
    """Pointers for the kernels, valid while this layer and its `packed` exist."""

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
        self.is_read = False
        """Whether a module has read `weight`, which unpacks it each time."""
        self.set_packed(packed)

    def set_packed(self, packed: torch.Tensor) -> None:
        """Read the weights from this tensor from now on."""
        self.packed = packed
        pointers = (None if t is None else t.data_ptr() for t in (packed, self.scale, self.bias))
        sizes = self.in_features, self.out_features, WEIGHT_TYPES.index(packed.dtype)
        self.weights = LinearWeights(*pointers, *sizes)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, the layer takes {self.in_features}")
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        out = torch.empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        self.kernels.linear(self.weights, x.data_ptr(), out.data_ptr(), rows)
        return out

    @property
    def weight(self) -> torch.Tensor:
        """`unpacked`, for a module that reads the weights of another, as some routers do."""
        self.is_read = True
        return self.unpacked()

    def unpacked(self) -> torch.Tensor:
        """The weight as float32 `[out, in]`; exact, except for the rounding of int8."""
        panels, depth, width = self.packed.shape
        weight = self.packed.transpose(1, 2).reshape(panels * width, depth)[: self.out_features]
        return weight.float() if self.scale is None else weight.float() * self.scale[:, None]


def pack_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernels: Kernels,
    quantization: Quantization | None = None,
) -> PackedLinear:
    """A linear layer with weight `[out, in]` and bias `[out]`, each float32 or 16-bit."""
    compact, scale = _compact(weight, quantization)
    if bias is not None:
        bias = bias.detach().to(torch.float32, copy=True)
    return PackedLinear(_pack(compact, kernels.panel_width), scale, bias, weight.shape[0], kernels)


def join(*layers: PackedLinear) -> PackedLinear | None:
    """One layer whose output is the concatenation of the layers' outputs.

    The layers themselves keep working, on the same memory. None if their types, inputs or biases
    differ, or an output is no whole number of panels.
    """
    first = layers[0]
    width = first.packed.shape[2]
    for layer in layers:
        alike = layer.packed.dtype == first.packed.dtype and layer.in_features == first.in_features
        same_bias = (layer.bias is None) == (first.bias is None)
        if not alike or not same_bias or layer.out_features % width:
            return None

    def concatenate(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    packed = torch.cat([layer.packed for layer in layers])
    parts = torch.split(packed, [len(layer.packed) for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.set_packed(part)
    return PackedLinear(
        packed,
        concatenate([layer.scale for layer in layers]),
        concatenate([layer.bias for layer in layers]),
        sum(layer.out_features for layer in layers),
        first.kernels,
    )


def pack_linears(
    model: PreTrainedModel, kernels: Kernels, quantization: Quantization | None = None
) -> int:
    """Replace the linear layers that compute in float32 on the CPU; returns their number.

    What a model that computes in float32 has in 16 bits besides them is cast. Subclasses of Linear,
    and layers whose forward is wrapped (because a hook brings in their
    weights, or they are split over ranks), are left alone. The caller checks the model's output.
    """
    types = [torch.float32]
    if casts := computes_in_float32(model):
        types += HALF
        remove_hooks(model)
    replaced = 0
    for parent, name in list(_linears(model, types)):
        # No variable refers to the layer, so that it is freed before the next one is packed.
        setattr(parent, name, _packed(getattr(parent, name), kernels, quantization))
        # Aligned tensors do not fit into the gaps that others of their size leave in the heap.
        give_back_memory()
        replaced += 1
    if casts:
        cast_to_float32(model)
    if replaced:
        _detach_from_files(model)
    return replaced


def _packed(
    layer: nn.Linear | Conv1D, kernels: Kernels, quantization: Quantization | None
) -> PackedLinear:
    weight = layer.weight.detach()
    if isinstance(layer, Conv1D):
        weight = weight.t()
    return pack_linear(weight, layer.bias, kernels, quantization)


def _detach_from_files(model: PreTrainedModel) -> None:
    """Copy the remaining tensors (embeddings, norms): one view keeps a whole weight file mapped."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def unpack_linears(model: PreTrainedModel, *, only_read: bool = False) -> None:
    """Replace the packed layers, or those whose weights are read, by `nn.Linear`."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear) and (layer.is_read or not only_read):
                linear = nn.Linear(1, 1)
                linear.out_features, linear.in_features = layer.out_features, layer.in_features
                linear.weight = nn.Parameter(layer.unpacked(), requires_grad=False)
                bias = layer.bias
                linear.register_parameter(
                    "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
                )
                setattr(parent, name, linear)


def _linears(
    model: PreTrainedModel, types: Collection[torch.dtype]
) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) not in (nn.Linear, Conv1D) or "forward" in vars(layer):
                continue
            if layer._forward_hooks or layer._forward_pre_hooks:
                continue
            if layer.weight.device.type == "cpu" and layer.weight.dtype in types:
                yield parent, name


def _compact(
    weight: torch.Tensor, quantization: Quantization | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight in the smallest type that keeps its values, and the scale `[out]` of int8."""
    if quantization == "int8":
        weight = weight.float()
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return (weight / scale[:, None]).round().to(torch.int8), scale.contiguous()
    if weight.dtype in HALF:
        return weight, None
    for dtype in reversed(HALF):
        # The first row first: most weights that do not fit differ there already.
        if all(torch.equal(w.to(dtype).float(), w) for w in (weight[:1], weight)):
            return weight.to(dtype), None
    return weight, None


def _pack(weight: torch.Tensor, width: int) -> torch.Tensor:
    """`[out, in]` to panels `[ceil(out / width), in, width]`, zero beyond `out`."""
    out, depth = weight.shape
    panels, full = -(-out // width), out // width
    packed = weight.new_zeros(panels, depth, width)
    packed[:full] = weight[: full * width].view(full, width, depth).transpose(1, 2)
    if full < panels:
        packed[full, :, : out - full * width] = weight[full * width :].t()
    return packed
