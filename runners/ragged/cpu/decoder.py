"""Whole decoder layers on one kernel: pre-norm, rotary attention, gated SiLU MLP, no dropout.

That is Llama, Mistral, Qwen 2 and 3, and most that came after them. With few rows, calling torch's
operators one by one takes half as long again as reading the weights; a layer here is one call.
Whether a model's layers are of this kind is known by their code, not their name, and proved on the
whole model after they were put in.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from runners.ragged.cpu import Kernels
from runners.ragged.cpu.fusing import FusedMLP, FusedRMSNorm
from runners.ragged.cpu.library import AttentionShape, LayerWeights, NormWeights
from runners.ragged.cpu.linear import PackedLinear, join
from runners.ragged.step import current


class FusedDecoderLayer(nn.Module):
    """A decoder layer over the rows of the current step: float32 `[1, T, hidden]`, in place."""

    def __init__(self, plain: Any, qkv: PackedLinear, kernels: Kernels) -> None:
        super().__init__()
        self.plain = plain
        attention, self.qkv = plain.self_attn, qkv
        self._index: int = attention.layer_idx
        heads = attention.q_proj.out_features // attention.head_dim
        self._kv_heads = attention.k_proj.out_features // attention.head_dim
        self._size: int = attention.head_dim
        value_stride = -(-self._size // 32) * 32
        shape = AttentionShape(
            heads,
            self._kv_heads,
            self._size,
            self._size,
            value_stride,
            0,
            attention.scaling,
            0.0,
        )
        none = NormWeights(None, 0.0, 0.0)
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self._weights = LayerWeights(
            plain.input_layernorm.weights(),
            plain.post_attention_layernorm.weights(),
            *(none if norm is None else norm.weights() for norm in norms),
            qkv.weights(),
            attention.o_proj.weights(),
            plain.mlp.gate_up.weights(),
            plain.mlp.down.weights(),
            shape,
        )
        self._scratch = (
            2 * qkv.in_features
            + qkv.out_features
            + attention.o_proj.in_features
            + 3 * plain.mlp.down.in_features
        )
        self._kernel = kernels.decoder_layer

    def _window(self) -> int:
        """0 for none. Read where the plain layer reads it, since a proof may narrow it."""
        attention = self.plain.self_attn
        owner = attention if hasattr(attention, "sliding_window") else attention.config
        return getattr(owner, "sliding_window", None) or 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """The layer's output, which takes the place of its input. Raises: TypeError, ValueError for
        what is no float32, and for rotary embeddings of another kind."""
        if hidden_states.dtype != torch.float32:
            raise TypeError(f"{hidden_states.dtype} in a float32 layer")
        assert position_embeddings is not None  # noqa: S101 - else the proof fails, as it should
        cos, sin = (each.contiguous() for each in position_embeddings)
        step = current.get()
        x = hidden_states.contiguous()
        rows = x.shape[1]
        if cos.shape != (1, rows, self._size) or cos.dtype != torch.float32:
            raise ValueError("rotary embeddings of another kind")
        self._weights.shape.window = self._window()
        like = x.new_empty(self._kv_heads, 0, self._size)
        layer = step.pool.layer(self._index, like, like)
        self._kernel(
            self._weights,
            x.data_ptr(),
            rows,
            cos.data_ptr(),
            sin.data_ptr(),
            layer.keys.data_ptr(),
            layer.values.data_ptr(),
            step.layout.data_ptr(),
            len(step.segments),
            step.tables.data_ptr(),
            step.scratch(rows * self._scratch).data_ptr(),
        )
        return x


def fuse_decoder_layers(model: nn.Module, kernels: Kernels) -> None:
    """Replace the layers that have the right parts; the parts are packed and fused already."""
    for parent in list(model.modules()):
        for name, plain in list(parent.named_children()):
            if _fits(plain):
                attention: Any = plain.self_attn
                qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
                if qkv is not None:
                    setattr(parent, name, FusedDecoderLayer(plain, qkv, kernels))


def unfuse_decoder_layers(model: nn.Module) -> None:
    """Put the layers back that were replaced."""
    for parent in list(model.modules()):
        for name, fused in list(parent.named_children()):
            if isinstance(fused, FusedDecoderLayer):
                setattr(parent, name, fused.plain)


@cache
def _known_code() -> frozenset[str]:
    """The forwards the kernel stands for. A proof with a short prompt would not notice, say, an
    attention that scales its queries beyond 16,000 tokens; most models' code is generated from
    these, word for word."""
    code = set()
    for module in (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3):
        code.add(inspect.getsource(module.apply_rotary_pos_emb))
        for name, found in vars(module).items():
            if name.endswith(("Attention", "DecoderLayer", "MLP")):
                code.add(inspect.getsource(found.forward))
    return frozenset(code)


def _is_known(layer: Any) -> bool:
    attention = type(layer.self_attn)
    rotate = getattr(sys.modules[attention.__module__], "apply_rotary_pos_emb", None)
    code = (type(layer).forward, attention.forward, type(layer.mlp.plain).forward, rotate)
    try:
        return all(inspect.getsource(each) in _known_code() for each in code)  # type: ignore[arg-type]
    except (OSError, TypeError):  # no source to read
        return False


def _fits(plain: Any) -> bool:
    attention = getattr(plain, "self_attn", None)
    if attention is None or hasattr(plain, "_hf_hook") or hasattr(attention, "_hf_hook"):
        return False
    norms = {"input_layernorm", "post_attention_layernorm"}
    if {name for name, x in plain.named_children() if isinstance(x, FusedRMSNorm)} != norms:
        return False
    projections: list[Any] = [getattr(attention, f"{x}_proj", None) for x in "qkvo"]
    if not isinstance(getattr(plain, "mlp", None), FusedMLP):
        return False
    if not all(isinstance(x, PackedLinear) for x in projections):
        return False
    q, k, v, o = projections
    hidden = plain.mlp.down.out_features
    return (
        _is_known(plain)
        and (q.out_features, k.out_features) == (o.in_features, v.out_features)
        and q.in_features == o.out_features == hidden
        and all(hasattr(attention, x) for x in ("layer_idx", "head_dim", "scaling", "config"))
        and all(
            norm is None or isinstance(norm, FusedRMSNorm)
            for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        )
    )
