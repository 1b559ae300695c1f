"""All decoder layers of a model in one kernel call: pre-norm, rotary attention, gated SiLU MLP.

Llama, Mistral, Qwen 2 and 3 and most of their successors have such layers. With few rows, calling
torch's operators one by one adds half of the time that reading the weights takes. Layers are
recognised by their source code, not their name, and the parity check of the whole model follows.
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
from typing_extensions import override

from runners.text.cpu import Kernels
from runners.text.cpu.fusing import FusedMLP, FusedRMSNorm
from runners.text.cpu.library import AttentionShape, KVPointers, LayerWeights, NormWeights
from runners.text.cpu.linear import PackedLinear, join
from runners.text.paging.batch import forward_context
from runners.text.paging.kv import KVPool, padded_size


class FusedDecoder(nn.Module):
    """The decoder layers of a model over the rows of the current batch, float32 `[1, T, hidden]`.

    The output overwrites the input. Raises: TypeError for another type than float32, ValueError for
    rotary embeddings of another shape.
    """

    def __init__(self, original: nn.ModuleList, qkv: list[PackedLinear], kernels: Kernels) -> None:
        super().__init__()
        self.original, self.qkv = original, nn.ModuleList(qkv)
        layers: list[Any] = list(original)
        self._attentions = [layer.self_attn for layer in layers]
        self._weights = (LayerWeights * len(layers))(*map(_weights, layers, qkv))
        self._size: int = self._weights[0].shape.key_size
        self._pool: KVPool | None = None
        self._kernel = kernels.decoder

    @override
    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **__: Any,
    ) -> torch.Tensor:
        if hidden_states.dtype != torch.float32:
            raise TypeError(f"{hidden_states.dtype} in a float32 layer")
        assert position_embeddings is not None  # noqa: S101 - if not, the parity check fails
        cos, sin = (each.contiguous() for each in position_embeddings)
        context = forward_context.get()
        x = hidden_states.contiguous()
        rows = x.shape[1]
        if cos.shape != (1, rows, self._size) or cos.dtype != torch.float32:
            raise ValueError("rotary embeddings of another kind")
        if context.pool is not self._pool:
            self._use_pool(context.pool, x)
        for weights, attention in zip(self._weights, self._attentions, strict=True):
            weights.shape.window = _window(attention)
        self._kernel(
            self._weights,
            len(self._weights),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            context.layout.data_ptr(),
            len(context.segments),
            context.block_tables.data_ptr(),
        )
        return x

    def _use_pool(self, pool: KVPool, like: torch.Tensor) -> None:
        """Read and write the keys and values of this pool from now on."""
        self._pool = pool
        like = like.new_empty(self._weights[0].shape.kv_heads, 0, self._size)
        for weights, attention in zip(self._weights, self._attentions, strict=True):
            layer = pool.layer(attention.layer_idx, like, like)
            weights.kv = KVPointers(layer.keys.data_ptr(), layer.values.data_ptr())


def _weights(layer: Any, qkv: PackedLinear) -> LayerWeights:
    attention = layer.self_attn
    size = attention.head_dim
    shape = AttentionShape(
        heads=attention.q_proj.out_features // size,
        kv_heads=attention.k_proj.out_features // size,
        key_size=size,
        value_size=size,
        value_stride=padded_size(size),
        scale=attention.scaling,
    )
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        layer.input_layernorm.weights,
        layer.post_attention_layernorm.weights,
        *(NormWeights() if norm is None else norm.weights for norm in norms),
        qkv.weights,
        attention.o_proj.weights,
        layer.mlp.gate_up.weights,
        layer.mlp.down.weights,
        shape,
    )


def _window(attention: Any) -> int:
    """The sliding window in tokens, 0 for none.

    Read at each step, where the original layer reads it: a parity check may narrow it.
    """
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(owner, "sliding_window", None) or 0


def fuse_decoder(model: nn.Module, kernels: Kernels) -> None:
    """Replace lists of layers that the kernel can run; their parts are packed and fused already."""
    for parent in list(model.modules()):
        for name, layers in list(parent.named_children()):
            if isinstance(layers, nn.ModuleList) and len(layers) and all(map(_fits, layers)):
                joined = [_join_qkv(layer) for layer in layers]
                qkv = [each for each in joined if each is not None]
                if len(qkv) == len(layers) and len({_sizes(layer) for layer in layers}) == 1:
                    setattr(parent, name, nn.ModuleList([FusedDecoder(layers, qkv, kernels)]))


def unfuse_decoder(model: nn.Module) -> None:
    """Restore the layers that were replaced."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ModuleList) and isinstance(
                next(iter(child), None), FusedDecoder
            ):
                setattr(parent, name, child[0].original)


def _join_qkv(layer: Any) -> PackedLinear | None:
    attention = layer.self_attn
    return join(attention.q_proj, attention.k_proj, attention.v_proj)


def _sizes(layer: Any) -> tuple[int, ...]:
    """The sizes that have to be the same in all layers of a call."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.o_proj, mlp.down)
    return (attention.head_dim, *(n for x in linears for n in (x.in_features, x.out_features)))


@cache
def _known_code() -> frozenset[str]:
    """The source code of the forwards that the kernel implements.

    A parity check with a short prompt would miss, for example, an attention that scales its queries
    beyond 16,000 tokens. The code of most models is generated from these, word for word.
    """
    code = set()
    for module in (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3):
        code.add(inspect.getsource(module.apply_rotary_pos_emb))
        for name, cls in vars(module).items():
            if name.endswith(("Attention", "DecoderLayer", "MLP")):
                code.add(inspect.getsource(cls.forward))
    return frozenset(code)


def _is_known(layer: Any) -> bool:
    attention = type(layer.self_attn)
    rotary = getattr(sys.modules[attention.__module__], "apply_rotary_pos_emb", None)
    code = (type(layer).forward, attention.forward, type(layer.mlp.original).forward, rotary)
    try:
        return all(inspect.getsource(each) in _known_code() for each in code)  # type: ignore[arg-type]
    except (OSError, TypeError):  # no source to read
        return False


def _fits(layer: Any) -> bool:
    """Whether the kernel computes what this layer does."""
    attention = getattr(layer, "self_attn", None)
    if attention is None or hasattr(layer, "_hf_hook") or hasattr(attention, "_hf_hook"):
        return False
    norms = {"input_layernorm", "post_attention_layernorm"}
    if {name for name, x in layer.named_children() if isinstance(x, FusedRMSNorm)} != norms:
        return False
    projections: list[Any] = [getattr(attention, f"{x}_proj", None) for x in "qkvo"]
    if not isinstance(getattr(layer, "mlp", None), FusedMLP):
        return False
    if not all(isinstance(x, PackedLinear) for x in projections):
        return False
    q, k, v, o = projections
    hidden = layer.mlp.down.out_features
    return (
        _is_known(layer)
        and (q.out_features, k.out_features) == (o.in_features, v.out_features)
        and q.in_features == o.out_features == hidden
        and all(hasattr(attention, x) for x in ("layer_idx", "head_dim", "scaling", "config"))
        and all(
            norm is None or isinstance(norm, FusedRMSNorm)
            for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        )
    )
