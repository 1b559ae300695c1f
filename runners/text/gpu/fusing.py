"""RMS norms, gated activations and rotary embeddings of a model in one launch each.

In eager mode they take most of a decoding step's launches, and a norm's sum has an order that
depends on the number of rows. Methods are replaced on the module itself, so its parameters and
children stay where they are, and only if they give, on a few rows, what the replacement gives.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from runners.text.gpu import kernels

ROTARY = "apply_rotary_pos_emb"
SCALES = (1e-3, 1.0, 1e3)
"""Of rows: small values reveal another epsilon, large ones a clamp."""
EQUAL_SHARE = 0.98
"""Numbers of a 16-bit result that must have the same bits. A sum in another order, or another
`exp`, changes the rounding of few, a rounding in another place that of many."""


class _Fused(Protocol):
    """What takes the place of a method, or of a function of a model's module."""

    original: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class FusedNorm(_Fused):
    """The forward of an RMS norm; arguments of `kernels.rows.rms_norm`."""

    original: Callable[[torch.Tensor], torch.Tensor]
    module: nn.Module
    eps: float
    offset: float
    rounds_first: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of rows `[..., n]`; what the kernel does not take goes to the original."""
        weight: Any = self.module.weight
        fits = x.shape[-1:] == weight.shape and weight.dtype in (x.dtype, torch.float32)
        if not fits or not _takes(x):
            return self.original(x)
        from runners.text.gpu.kernels.rows import rms_norm

        return rms_norm(x, weight, self.eps, self.offset, self.rounds_first)


@dataclass(frozen=True, eq=False)
class FusedMLP(_Fused):
    """The forward of `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""

    original: Callable[[torch.Tensor], torch.Tensor]
    module: Any
    is_silu: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP of rows `[..., n]`."""
        module = self.module
        gate, up = module.gate_proj(x), module.up_proj(x)
        result: torch.Tensor = module.down_proj(_gated(gate, up, module.act_fn, self.is_silu))
        return result


@dataclass(frozen=True, eq=False)
class FusedGate(_Fused):
    """`_apply_gate` of the experts of transformers: `act_fn(gate) * up` of both in one row."""

    original: Callable[[torch.Tensor], torch.Tensor]
    module: Any
    is_silu: bool

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`[..., n]` of `[..., 2 n]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return _gated(gate, up, self.module.act_fn, self.is_silu)


@dataclass(frozen=True, eq=False)
class FusedRotary(_Fused):
    """Llama's `apply_rotary_pos_emb`."""

    original: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments as transformers has them."""
        alike = {each.dtype for each in (q, k, cos, sin)} == {q.dtype} and _takes(q)
        fits = q.dim() == 4 and len(q) == 1 and cos.shape == sin.shape == (1, *q.shape[2:])
        fits = fits and k.shape == (1, k.shape[1], *q.shape[2:]) and q.shape[3] % 2 == 0
        if not alike or not fits or unsqueeze_dim != 1:
            return self.original(q, k, cos, sin, unsqueeze_dim)
        from runners.text.gpu.kernels.rows import rotary

        return rotary(q, k, cos, sin)


def fuse_rows(model: PreTrainedModel) -> int:
    """Replace what has an equivalent on the devices of the model; returns how many there are.

    Modules with hooks, such as those of parts that move between devices, stay as they are.
    """
    count = 0
    for module in model.modules():
        if not _has_hooks(module):
            for name, fused in _candidates(module):
                if name not in vars(module) and _equivalent(fused):
                    # Not `setattr`, which takes a module for a child.
                    vars(module)[name] = fused
                    count += 1
                    break
    for source in _sources(model):
        function: Any = vars(source).get(ROTARY)
        if not isinstance(function, FusedRotary) and _is_llama_rotary(source):
            vars(source)[ROTARY] = FusedRotary(function)
            count += 1
    return count


def unfuse_rows(model: PreTrainedModel) -> None:
    """Restore what was replaced."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, FusedNorm | FusedMLP | FusedGate):
                del vars(module)[name]
    for source in _sources(model):
        if isinstance(function := vars(source).get(ROTARY), FusedRotary):
            vars(source)[ROTARY] = function.original


def fused_functions() -> list[str]:
    """The Python modules whose functions are replaced, for every model of this process."""
    return sorted(
        name
        for name, source in list(sys.modules.items())
        if isinstance(getattr(source, "__dict__", {}).get(ROTARY), FusedRotary)
    )


def _candidates(module: nn.Module) -> Iterator[tuple[str, FusedNorm | FusedMLP | FusedGate]]:
    """Possible replacements of methods of a module."""
    any_module: Any = module
    if type(module).__name__.endswith("RMSNorm"):
        weight: Any = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1 and _takes(weight):
            from runners.text.gpu.kernels.rows import MAX_NORM_SIZE

            if len(weight) > MAX_NORM_SIZE:
                return
            eps = _epsilon(module)
            for offset, rounds_first in ((0.0, True), (0.0, False), (1.0, False)):
                yield "forward", FusedNorm(module.forward, module, eps, offset, rounds_first)
        return
    if not callable(getattr(module, "act_fn", None)):
        return
    is_mlp = all(
        isinstance(getattr(module, name, None), nn.Linear)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    for is_silu in (True, False):
        if is_mlp:
            yield "forward", FusedMLP(module.forward, module, is_silu)
        elif hasattr(module, "_apply_gate"):
            yield "_apply_gate", FusedGate(any_module._apply_gate, module, is_silu)


@torch.inference_mode()
def _equivalent(fused: FusedNorm | FusedMLP | FusedGate) -> bool:
    try:
        return all(_same(fused, rows) for rows in _rows(fused))
    except Exception:  # its forward takes other arguments, or its weights are of another kind
        return False


def _rows(fused: FusedNorm | FusedMLP | FusedGate) -> Iterator[torch.Tensor]:
    """Rows to compare results on."""
    if isinstance(fused, FusedMLP):
        parameter, size = fused.module.gate_proj.weight, fused.module.gate_proj.in_features
    elif isinstance(fused, FusedGate):
        parameter, size = next(fused.module.parameters()), 512
    else:
        parameter = fused.module.weight
        assert isinstance(parameter, torch.Tensor)  # noqa: S101 - `_candidates` checked it
        size = len(parameter)
    generator = torch.Generator(parameter.device).manual_seed(0)
    for scale in SCALES:
        rows = torch.randn(1, 3, size, generator=generator, device=parameter.device)
        yield (scale * rows).to(parameter.dtype)


def _same(fused: FusedNorm | FusedMLP | FusedGate, rows: torch.Tensor) -> bool:
    if isinstance(fused, FusedMLP):
        # Its products would hide a difference of the activation.
        gate, up = fused.module.gate_proj(rows), fused.module.up_proj(rows)
        act_fn = fused.module.act_fn
        if not _close(_gated(gate, up, act_fn, fused.is_silu), act_fn(gate) * up):
            return False
        result, expected = fused(rows), fused.original(rows)
        tolerance = 8 * torch.finfo(rows.dtype).eps * float(expected.abs().max())
        return torch.allclose(result, expected, rtol=0, atol=tolerance)
    return _close(fused(rows), fused.original(rows))


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    if result.dtype != expected.dtype or result.shape != expected.shape:
        return False
    eps = torch.finfo(result.dtype).eps
    is_float32 = result.dtype == torch.float32
    # GELU as torch computes it loses its last digits below 0.
    noise = 1e-6 * float(expected.abs().max())
    alike = (result == expected) | ((result - expected).abs() <= noise)
    if not is_float32 and float(alike.float().mean()) < EQUAL_SHARE:
        return False
    return torch.allclose(result, expected, rtol=(32 if is_float32 else 2) * eps, atol=noise)


def _gated(
    gate: torch.Tensor, up: torch.Tensor, act_fn: Callable[..., torch.Tensor], is_silu: bool
) -> torch.Tensor:
    if not _takes(gate) or up.dtype != gate.dtype or up.shape != gate.shape:
        return act_fn(gate) * up
    from runners.text.gpu.kernels.rows import gated

    return gated(gate, up, "silu" if is_silu else "gelu_tanh")


def _takes(x: torch.Tensor) -> bool:
    """Whether the kernels take rows of this tensor."""
    if not kernels.runs_on(x.device):
        return False
    from runners.text.gpu.kernels.rows import DTYPES

    return x.dtype in DTYPES and x.numel() > 0


def _has_hooks(module: nn.Module) -> bool:
    return bool(hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks)


def _sources(model: PreTrainedModel) -> set[ModuleType]:
    """The Python modules that define the model's modules."""
    names = {type(module).__module__ for module in model.modules()}
    return {sys.modules[name] for name in names if name in sys.modules}


def _is_llama_rotary(source: ModuleType) -> bool:
    """Whether a module's functions are word for word those of Llama, without documentation."""
    return all(
        _statements(vars(source).get(name)) == _statements(vars(modeling_llama).get(name))
        for name in (ROTARY, "rotate_half")
    )


def _statements(function: Any) -> str:
    """The parameters and statements of a function."""
    if not inspect.isfunction(function):
        return f"no function: {function}"
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)  # noqa: S101 - of a function
    statements = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return "\n".join(map(ast.dump, [tree.args, *statements]))


def _epsilon(norm: nn.Module) -> float:
    eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return torch.finfo(torch.float32).eps if eps is None else float(eps)
