"""RMS norms and gated MLPs on the CPU kernels.

Their arithmetic is cheap, but dispatching torch's operators takes a third of a step with one row. A
module is replaced only if its forward, on a few rows, gives what the replacement gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from runners.text.cpu import Kernels
from runners.text.cpu.library import NormWeights
from runners.text.cpu.linear import PackedLinear, join


class FusedRMSNorm(nn.Module):
    """`x / rms(x) * (offset + weight)` over the last dimension, float32. Gemma's offset is 1.

    Rows of another type go to the original module: a half-precision model may have float32 norms.
    """

    def __init__(self, original: nn.Module, kernels: Kernels, offset: float) -> None:
        super().__init__()
        self.original = original
        weight: Any = original.weight
        self.weight: nn.Parameter = weight
        self._size = len(weight)
        self._kernel = kernels.rms_norm
        self.weights = NormWeights(weight.data_ptr(), _epsilon(original), offset)
        """Pointers for the kernels, valid while this module exists."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            result: torch.Tensor = self.original(x)
            return result
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // self._size
        self._kernel(self.weights, x.data_ptr(), out.data_ptr(), rows, self._size)
        return out


class FusedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` with gate and up joined, `[..., hidden]` to `[..., hidden]`.

    Rows of another type than float32 go to the original module.
    """

    def __init__(
        self, original: nn.Module, gate_up: PackedLinear, down: PackedLinear, kernels: Kernels
    ) -> None:
        super().__init__()
        self.original = original
        self.gate_up, self.down = gate_up, down
        self._kernel = kernels.gated_mlp

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            result: torch.Tensor = self.original(x)
            return result
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.down.out_features)
        rows = x.numel() // self.gate_up.in_features
        weights = self.gate_up.weights, self.down.weights
        self._kernel(*weights, x.data_ptr(), out.data_ptr(), rows)
        return out


def fuse_modules(model: nn.Module, kernels: Kernels) -> None:
    """Replace the modules that have an equivalent; the linear layers are packed already."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            for fused, size in _candidates(module, kernels):
                if _equivalent(module, fused, size):
                    setattr(parent, name, fused)
                    break


def unfuse_modules(model: nn.Module) -> None:
    """Restore the modules that were replaced."""
    for parent in list(model.modules()):
        for name, fused in list(parent.named_children()):
            if isinstance(fused, FusedRMSNorm | FusedMLP):
                setattr(parent, name, fused.original)


def _candidates(module: nn.Module, kernels: Kernels) -> Iterator[tuple[nn.Module, int]]:
    """Possible replacements of a module, each with the size of its rows."""
    if hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks:
        return
    if type(module).__name__.endswith("RMSNorm"):
        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.dim() == 1:
            for offset in (0.0, 1.0):
                yield FusedRMSNorm(module, kernels, offset), len(weight)
        return
    gate, up, down = (getattr(module, n, None) for n in ("gate_proj", "up_proj", "down_proj"))
    if all(isinstance(x, PackedLinear) for x in (gate, up, down)):
        gate_up = join(gate, up)  # type: ignore[arg-type]
        if gate_up is not None:
            yield FusedMLP(module, gate_up, down, kernels), gate_up.in_features  # type: ignore[arg-type]


@torch.inference_mode()
def _equivalent(module: nn.Module, fused: nn.Module, size: int) -> bool:
    # Small values reveal another epsilon, large ones a clamp.
    for scale in (1e-3, 1.0, 1e3):
        x = scale * torch.linspace(-2, 3, 3 * size).view(1, 3, size)
        try:
            expected = module(x)
        except Exception:  # its forward takes other arguments
            return False
        if not isinstance(expected, torch.Tensor):
            return False
        tolerance = 1e-5 * float(expected.abs().max())
        if not torch.allclose(fused(x), expected, rtol=1e-4, atol=tolerance):
            return False
    return True


def _epsilon(norm: nn.Module) -> float:
    eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return torch.finfo(torch.float32).eps if eps is None else float(eps)
