"""What is fused and replaced on a GPU: modules, operators, and the bits of models in a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from runners.text import loading, parity
from runners.text.gpu import invariance, kernels
from runners.text.gpu.fusing import (
    FusedGate,
    FusedMLP,
    FusedNorm,
    FusedRotary,
    fuse_rows,
    unfuse_rows,
)
from runners.text.gpu.invariance import (
    find_batch_dependence,
    install_invariant_operators,
    remove_invariant_operators,
)
from runners.text.gpu.kernels import rows
from runners.text.gpu.step import StepLimits
from tests.support.models import CONFIGS, LAYERS, VOCAB, greedy, write_tokenizer
from tests.support.scheduling import Run, load, sequence

pytestmark = pytest.mark.usefixtures("rounding")

NORMS = [(LlamaRMSNorm, 0.0, True), (GptOssRMSNorm, 0.0, False), (Gemma3RMSNorm, 1.0, False)]


@pytest.fixture
def fuse() -> Iterator[Callable[[Any], int]]:
    """`fuse_rows`, undone after the test."""
    models: list[Any] = []

    def fuse(model: Any) -> int:
        models.append(model)
        return fuse_rows(model)

    yield fuse
    for model in models:
        unfuse_rows(model)


@pytest.fixture
def invariant_cpu() -> Iterator[None]:
    """Operators on CPU tensors are those that no batch changes."""
    install_invariant_operators("cpu")
    yield
    remove_invariant_operators("cpu")


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(kind: Callable[[int], nn.Module], size: int, dtype: torch.dtype) -> nn.Module:
    module = kind(size)
    module.weight = nn.Parameter(random(size, dtype=dtype, seed=1), requires_grad=False)
    return module


def tiny(name: str, layers: int = LAYERS) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.train(False)
    return model


def fused_kinds(model: nn.Module) -> dict[str, int]:
    kinds = [type(value) for module in model.modules() for value in vars(module).values()]
    return {
        kind.__name__: kinds.count(kind)
        for kind in (FusedNorm, FusedMLP, FusedGate)
        if kind in kinds
    }


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.tensor([[1, 5, 7, 9, 11]])
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", {"FusedNorm": 7, "FusedMLP": 3}),
        ("qwen3", {"FusedNorm": 13, "FusedMLP": 3}),
        ("gemma3", {"FusedNorm": 19, "FusedMLP": 3}),
        ("mixtral", {"FusedNorm": 7, "FusedGate": 3}),
        ("gpt2", {}),
    ],
)
def test_models_are_fused_and_restored(name: str, kinds: dict[str, int]) -> None:
    model = tiny(name)
    expected = logits(model)
    fuse_rows(model)
    try:
        assert fused_kinds(model) == kinds
        result = logits(model)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(result, expected) == (not kinds)
    finally:
        unfuse_rows(model)
    assert not fused_kinds(model)
    assert torch.equal(logits(model), expected)


def test_each_norm_gets_the_rounding_of_its_architecture(fuse: Callable[[Any], int]) -> None:
    """In 16 bits they differ, in float32 the first two do not."""
    for kind, offset, rounds_first in NORMS:
        model: Any = nn.ModuleList([norm(kind, 64, torch.bfloat16)])
        fuse(model)
        fused = vars(model[0])["forward"]
        assert (fused.offset, fused.rounds_first) == (offset, rounds_first)


class ClampedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(hidden_states.clamp(-100, 100))
        return result


class TwoTimesMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = 2 * super().forward(x)
        return result


def test_what_computes_something_else_is_left_alone(fuse: Callable[[Any], int]) -> None:
    config: Any = CONFIGS["llama"]()
    hooked = norm(LlamaRMSNorm, 64, torch.float32)
    hooked.register_forward_hook(lambda *_: None)
    moved: Any = norm(LlamaRMSNorm, 64, torch.float32)
    moved._hf_hook = object()
    config.hidden_act = "relu"
    large = LlamaRMSNorm(rows.MAX_NORM_SIZE + 1)
    others = [
        ClampedRMSNorm(64),
        large,
        TwoTimesMLP(CONFIGS["llama"]()),
        LlamaMLP(config),
        hooked,
        moved,
    ]
    model: Any = nn.ModuleList(others)
    fuse(model)
    assert not fused_kinds(model)


def test_only_the_rotary_embedding_of_llama_is_replaced(fuse: Callable[[Any], int]) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    cohere: Any = nn.ModuleList([modeling_cohere.CohereLayerNorm(8)])
    assert fuse(cohere) == 0
    model = tiny("llama", layers=1)
    assert fuse(model) == 5
    assert isinstance(modeling_llama.apply_rotary_pos_emb, FusedRotary)
    two, angles = random(2, 3, 4, 8), random(1, 4, 8)
    result = modeling_llama.apply_rotary_pos_emb(two, two, angles, angles)
    # Of two sequences it is not the kernel's.
    assert all(map(torch.equal, result, original(two, two, angles, angles)))
    assert fuse(model) == 0  # all is fused
    unfuse_rows(model)
    assert modeling_llama.apply_rotary_pos_emb is original


def test_replaced_operators_agree_with_those_of_torch() -> None:
    a, b = random(9, 70), random(70, 40, seed=1)
    column_major = b.t().contiguous().t()
    counts, bits = torch.arange(200).view(2, 100), torch.ones(3, 64, dtype=torch.bool)
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: a @ b,
        lambda: a @ column_major,
        lambda: functional.linear(a.view(1, 9, 70), column_major.t(), b[0]),
        lambda: torch.addmm(b[0], a, b),
        lambda: torch.addmm(b[0], a, b, beta=0.5, alpha=2),
        lambda: torch.addmm(a[:, :40], a, b),
        lambda: a.expand(3, 9, 70) @ b.expand(3, 70, 40),
        lambda: a.double() @ b.double(),
        lambda: a.mean(-1),
        lambda: a.mean(1, keepdim=True),
        lambda: a.mean((0, 1)),
        lambda: a.half().mean(-1, dtype=torch.float32),
        lambda: a.bfloat16().sum(-1),
        lambda: a.sum(0, keepdim=True),
        lambda: a.sum((0, 1)),
        lambda: a.double().sum(-1),
        lambda: counts.sum(-1),
        lambda: counts.sum(1, dtype=torch.float32),
        lambda: bits.sum(-1),
        lambda: a[:0].sum(-1),
        lambda: a[:0] @ b,
        lambda: torch.ones(()).sum(-1),
    ]
    with torch.inference_mode():
        expected = [call() for call in calls]
        install_invariant_operators("cpu")
        try:
            results = [call() for call in calls]
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                a @ a
            with pytest.raises(RuntimeError):
                torch.mean(counts, -1)
        finally:
            remove_invariant_operators("cpu")
        restored = calls[0]()
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        tolerance = max(1e-5, torch.finfo(wanted.dtype).eps) if wanted.is_floating_point() else 0
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(restored, expected[0])


def test_operators_need_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    with pytest.raises(RuntimeError, match="no Triton kernels for cpu"):
        install_invariant_operators("cpu")


@pytest.mark.parametrize(("name", "size"), [("llama", 3), ("mixtral", 2)])
def test_a_models_bits_do_not_depend_on_the_batch(
    name: str,
    size: int,
    fuse: Callable[[Any], int],
    invariant_cpu: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(invariance, "BATCHES", (size,))
    model = tiny(name, layers=1)
    expected = logits(model)
    fuse(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    runner: Any = Packed(model)
    with caplog.at_level(logging.INFO):
        invariance.log_batch_dependence(name, StepLimits(40, size, 64), lambda blocks: runner)
    assert caplog.messages == [f"{name} gives a sequence the same bits in any batch"]


class Packed:
    """A runner without attention over other rows: only the operators are compared."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, batch: Any) -> torch.Tensor:
        ids = torch.tensor([[token for tokens in batch.tokens for token in tokens]])
        last = torch.tensor([len(tokens) for tokens in batch.tokens]).cumsum(0) - 1
        mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        mask = mask + mask.mT
        out: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return out[0, last]


def test_a_dependence_on_the_batch_is_found() -> None:
    def run(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        calls.append(len(prompts))
        rows = torch.tensor([[float(sum(prompt))] for prompt in prompts])
        return rows + 1e-6 * (len(prompts) in dependent)

    calls: list[int] = []
    dependent: set[int] = set()
    assert find_batch_dependence(run, 20, VOCAB) is None
    assert calls == [1, 1, 1, 2, 3, 9, 17, 20]
    dependent = {3, 20}
    assert find_batch_dependence(run, 20, VOCAB) == "among 3 or 20"
    assert find_batch_dependence(run, 1, VOCAB) is None


def test_a_model_is_served_with_kernels_that_match(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As on a GPU, but for the operators, which are those of CPU tensors."""
    monkeypatch.setattr(parity, "compiled_for", lambda device: True)
    monkeypatch.setattr(loading, "compiled_for", lambda device: True)
    monkeypatch.setattr(invariance, "BATCHES", (2,))
    tiny("llama", layers=1).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    want = greedy(tmp_path, [[5, 6, 7]], 4)[0]
    limits: dict[str, Any] = {"kv_tokens": 128, "max_step_tokens": 32, "max_batch_size": 4}
    with caplog.at_level(logging.INFO):
        engine = load(tmp_path, attention_kernel="torch", **limits)
    model: Any = engine.model
    try:
        assert fused_kinds(model.model) == {"FusedNorm": 3, "FusedMLP": 1}
        run = Run(engine)
        run.scheduler.add(sequence("only", [5, 6, 7], 4))
        run.drain()
        assert run.tokens == {"only": want}
        assert any(" bits " in message for message in caplog.messages)
    finally:
        unfuse_rows(model.model)
        remove_invariant_operators("cuda")
