"""The kernels on rows, and products of batches and groups, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from runners.text.gpu.kernels.matmul import batched, grouped
from runners.text.gpu.kernels.rows import gated, rms_norm, rotary, row_sum

pytestmark = pytest.mark.usefixtures("rounding")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [(LlamaRMSNorm, 0.0, True), (GptOssRMSNorm, 0.0, False), (Gemma3RMSNorm, 1.0, False)]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(kind: Callable[[int], nn.Module], size: int, dtype: torch.dtype) -> nn.Module:
    module = kind(size)
    module.weight = nn.Parameter(random(size, dtype=dtype, seed=1), requires_grad=False)
    return module


def assert_rounded_alike(result: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but where the order of a sum or another `exp` changed the last one."""
    assert result.dtype == expected.dtype
    eps = torch.finfo(expected.dtype).eps
    # GELU as torch computes it loses its last digits below 0.
    noise = 5e-7 * float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=4 * eps, atol=noise)
    if expected.dtype != torch.float32:
        alike = (result == expected) | ((result - expected).abs() <= noise)
        assert alike.float().mean() >= 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "offset", "rounds_first"), NORMS)
@pytest.mark.parametrize("size", [20, 128, 1030])
def test_rms_norm_rounds_as_the_modules_of_transformers(
    kind: Callable[[int], nn.Module],
    offset: float,
    rounds_first: bool,
    size: int,
    dtype: torch.dtype,
) -> None:
    module, x = norm(kind, size, dtype), random(2, 9, size, dtype=dtype)
    weight: Any = module.weight
    result = rms_norm(x, weight, 1e-6, offset, rounds_first)
    assert_rounded_alike(result, module(x))
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        result.double(), exact * (offset + weight.double()), rtol=tolerance, atol=tolerance
    )
    for part in (slice(0, 1), slice(3, 8), slice(8, 9)):
        alone = rms_norm(x[1:, part], weight, 1e-6, offset, rounds_first)
        assert torch.equal(alone, result[1:, part])


def test_a_float32_norm_of_halves_has_the_type_of_the_original() -> None:
    for kind, offset, rounds_first in NORMS:
        module, x = norm(kind, 64, torch.float32), random(3, 64, dtype=torch.bfloat16)
        weight: Any = module.weight
        assert_rounded_alike(rms_norm(x, weight, 1e-6, offset, rounds_first), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [33, 1024, 2500])
def test_a_sum_has_the_same_bits_in_any_batch(size: int, dtype: torch.dtype) -> None:
    x = random(2, 5, size, dtype=dtype)
    total = row_sum(x)
    assert total.shape == (2, 5)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), x.double().sum(-1), rtol=1e-5, atol=1e-4)
    assert torch.equal(row_sum(x[1, 2]), total[1, 2])
    # Neither contiguous nor aligned.
    assert torch.equal(row_sum(x.transpose(0, 1)[1:, 1]), total[1, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_round_as_torch_does(activation: Any, dtype: torch.dtype) -> None:
    joined = 4 * random(2, 3, 2 * 1100, dtype=dtype)
    joined[0, 0, :3] = torch.tensor([90, -90, 0], dtype=dtype)
    for gate, up in (joined.chunk(2, dim=-1), (joined, joined.flip(-1))):
        result = gated(gate, up, activation)
        assert_rounded_alike(result, ACTIVATIONS[activation](gate) * up)
        assert torch.equal(gated(gate[1, 2:], up[1, 2:], activation), result[1, 2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(5, 2, 12), (1, 1, 128), (9, 9, 64)])
def test_rotary_embeddings_have_the_bits_of_llama(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    query, key = (
        random(1, 3, n * size, dtype=dtype, seed=n).view(1, 3, n, size).transpose(1, 2)
        for n in (heads, kv_heads)
    )
    cos, sin = random(1, 3, size, dtype=dtype), random(1, 3, size, dtype=dtype, seed=1)
    results = rotary(query, key, cos, sin)
    for result, expected in zip(
        results, modeling_llama.apply_rotary_pos_emb(query, key, cos, sin), strict=True
    ):
        assert torch.equal(result, expected)
        assert result[0].transpose(0, 1).is_contiguous()  # as attention reads it
    # The other layout, in which heads come first.
    for result, again in zip(
        results, rotary(query.contiguous(), key.contiguous(), cos, sin), strict=True
    ):
        assert torch.equal(result, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_batches(dtype: torch.dtype) -> None:
    a, b = random(3, 19, 70, dtype=dtype), random(3, 33, 70, dtype=dtype, seed=1).mT
    result = batched(a, b)
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=0, atol=tolerance)
    assert torch.equal(batched(a[1:, 7:8], b[1:]), result[1:, 7:8])
    assert torch.equal(batched(a, b.contiguous()), result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_products_of_groups(dtype: torch.dtype, is_transposed: bool) -> None:
    x, weight = random(40, 70, dtype=dtype), random(5, 33, 70, dtype=dtype, seed=1).mT
    weight = weight.contiguous() if is_transposed else weight
    result = grouped(x, weight, torch.tensor([0, 9, 9, 30, 38], dtype=torch.int32))
    tolerance = 100 * torch.finfo(dtype).eps
    for group, first, last in ((1, 0, 9), (3, 9, 30), (4, 30, 38)):
        expected = x[first:last].double() @ weight[group].double()
        torch.testing.assert_close(result[first:last].double(), expected, rtol=0, atol=tolerance)
    assert not result[38:].any()
    alone = grouped(x[17:18], weight, torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32))
    assert torch.equal(alone[0], result[17])
