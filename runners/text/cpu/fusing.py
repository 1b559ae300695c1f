"""Small modules of common architectures on our kernels: RMS norms, gated MLPs.

Each costs little arithmetic and much dispatching, a third of a step with one row. A module is
replaced only where its own forward, on a few rows, gives what the replacement gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from runners.text.cpu import Kernels
from runners.text.cpu.library import NormWeights
from runners.text.cpu.linear import PackedLinear, join


class FusedRMSNorm(nn.Module):
    """`x / rms(x) * (offset + weight)` over the last dimension, float32. Gemma's offset is 1."""

    def __init__(self, plain: nn.Module, kernels: Kernels, offset: float) -> None:
        super().__init__()
        self.plain = plain
        weight: Any = plain.weight
        self.weight: nn.Parameter = weight
        self._size = len(weight)
        self._kernel = kernels.rms_norm
        self.weights = NormWeights(weight.data_ptr(), _epsilon(plain), offset)
        """What the kernels need to know of it; valid as long as it lives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalised rows, in a tensor of their own."""
        if x.dtype != torch.float32:
            return _plain(self.plain, x)
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // self._size
        self._kernel(self.weights, x.data_ptr(), out.data_ptr(), rows, self._size)
        return out


class FusedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up joined: `[..., hidden]` to `[..., hidden]`."""

    def __init__(
        self, plain: nn.Module, gate_up: PackedLinear, down: PackedLinear, kernels: Kernels
    ) -> None:
        super().__init__()
        self.plain = plain
        self.gate_up, self.down = gate_up, down
        self._kernel = kernels.gated_mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP of every row."""
        if x.dtype != torch.float32:
            return _plain(self.plain, x)
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.down.out_features)
        rows = x.numel() // self.gate_up.in_features
        weights = self.gate_up.weights, self.down.weights
        self._kernel(*weights, x.data_ptr(), out.data_ptr(), rows)
        return out


def _plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module itself makes of rows that are no float32: norms may be, in a half-precision
    model."""
    out: torch.Tensor = module(x)
    return out


def fuse_modules(model: nn.Module, kernels: Kernels) -> None:
    """Replace what can be; linear layers are packed already."""
    for parent in list(model.modules()):
        for name, plain in list(parent.named_children()):
            for fused, size in _candidates(plain, kernels):
                if _agrees(plain, fused, size):
                    setattr(parent, name, fused)
                    break


def unfuse_modules(model: nn.Module) -> None:
    """Put the modules back that were replaced."""
    for parent in list(model.modules()):
        for name, fused in list(parent.named_children()):
            if isinstance(fused, FusedRMSNorm | FusedMLP):
                setattr(parent, name, fused.plain)


def _candidates(plain: nn.Module, kernels: Kernels) -> Iterator[tuple[nn.Module, int]]:
    """What may stand for a module, and the size of its rows."""
    if hasattr(plain, "_hf_hook") or plain._forward_hooks or plain._forward_pre_hooks:
        return
    weight: Any = getattr(plain, "weight", None)
    if type(plain).__name__.endswith("RMSNorm") and isinstance(weight, torch.Tensor):
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.dim() == 1:
            for offset in (0.0, 1.0):
                yield FusedRMSNorm(plain, kernels, offset), len(weight)
        return
    gate, up, down = (getattr(plain, n, None) for n in ("gate_proj", "up_proj", "down_proj"))
    if all(isinstance(x, PackedLinear) for x in (gate, up, down)):
        joined = join(gate, up)  # type: ignore[arg-type]
        if joined is not None:
            yield FusedMLP(plain, joined, down, kernels), joined.in_features  # type: ignore[arg-type]


@torch.inference_mode()
def _agrees(plain: nn.Module, fused: nn.Module, size: int) -> bool:
    # Small rows show another epsilon, large ones a clamp.
    for scale in (1e-3, 1.0, 1e3):
        x = scale * torch.linspace(-2, 3, 3 * size).view(1, 3, size)
        try:
            expected = plain(x)
        except Exception:  # a module of that name which wants more than rows
            return False
        if not isinstance(expected, torch.Tensor):
            return False
        tolerance = 1e-5 * float(expected.abs().max())
        if not torch.allclose(fused(x), expected, rtol=1e-4, atol=tolerance):
            return False
    return True


def _epsilon(norm: nn.Module) -> float:
    found: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return torch.finfo(torch.float32).eps if found is None else float(found)
