"""Our CPU kernels against torch: linear layers in all weight types, attention, fused modules."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    Ministral3Config,
    Ministral3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from runners.protocol.cache import cache_folder
from runners.text.cpu import Kernels, library, load_kernels, switch_off_kernels
from runners.text.cpu.decoder import FusedDecoder
from runners.text.cpu.fusing import FusedMLP, FusedRMSNorm, fuse_modules
from runners.text.cpu.linear import PackedLinear, join, pack_linear
from runners.text.parity import check_and_pack
from tests.support.models import write_model


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load_kernels()
    assert found is not None, "these tests need a C++ compiler"
    return found


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 24, 40, 100])
@pytest.mark.parametrize(("out", "depth"), [(32, 16), (33, 7), (5, 64), (200, 2100)])
def test_every_width_and_shape_is_right(kernels: Kernels, rows: int, out: int, depth: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(out, depth), torch.randn(out), torch.randn(1, rows, depth)
    layer = pack_linear(weight, bias, kernels)
    assert layer.packed.dtype == torch.float32
    torch.testing.assert_close(layer(x), linear(x, weight, bias), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_does_all_of_the_work(kernels: Kernels, threads: int) -> None:
    """More than there are cores: some begin when the others have taken over their share."""
    torch.manual_seed(0)
    openmp = ctypes.CDLL("libgomp.so.1")
    usual = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(threads)
    try:
        for panels in (1, 2, 7, 64):
            weight, x = torch.randn(panels * kernels.panel_width, 40), torch.randn(9, 40)
            layer = pack_linear(weight, None, kernels)
            for _ in range(50):
                torch.testing.assert_close(layer(x), linear(x, weight), rtol=1e-4, atol=1e-4)
    finally:
        openmp.omp_set_num_threads(usual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_stay_so_and_are_exact(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 50).to(dtype).float()
    layer = pack_linear(weight, None, kernels)
    assert layer.packed.dtype == dtype
    assert torch.equal(layer.unpacked(), weight)
    x = torch.randn(3, 50)
    torch.testing.assert_close(layer(x), linear(x, weight), rtol=1e-4, atol=1e-4)


def test_int8_rounds_each_output_by_its_own_scale(kernels: Kernels) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 50) * torch.logspace(-3, 3, 70)[:, None]
    weight[3] = 0
    layer = pack_linear(weight, None, kernels, "int8")
    assert layer.packed.dtype == torch.int8
    half_a_step = weight.abs().amax(1, keepdim=True) / 127 / 2 + 1e-12
    assert ((layer.unpacked() - weight).abs() <= half_a_step * 1.001).all()
    x = torch.randn(4, 50)
    torch.testing.assert_close(layer(x), linear(x, layer.unpacked()), rtol=1e-4, atol=1e-2)


def test_odd_inputs_are_taken(kernels: Kernels) -> None:
    weight = torch.randn(8, 6)
    layer = pack_linear(weight, None, kernels)
    assert layer(torch.empty(1, 0, 6)).shape == (1, 0, 8)
    x = torch.randn(6, 5).t()
    torch.testing.assert_close(layer(x), linear(x, weight))
    torch.testing.assert_close(layer(x.double()), linear(x, weight))


def test_joined_layers_are_one_and_still_work_apart(kernels: Kernels) -> None:
    weights = [torch.randn(n, 20) for n in (32, 64, 32)]
    layers = [pack_linear(w, torch.randn(len(w)), kernels) for w in weights]
    joined = join(*layers)
    assert joined is not None
    x = torch.randn(3, 20)
    torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in layers], -1))
    assert layers[1].packed.data_ptr() == joined.packed[1].data_ptr() or kernels.panel_width != 32
    odd = pack_linear(torch.randn(33, 20), torch.randn(33), kernels)
    assert join(layers[0], odd) is None
    assert join(layers[0], pack_linear(torch.randn(32, 20), None, kernels)) is None


def test_norms_are_right_with_and_without_offset(kernels: Kernels) -> None:
    plain = torch.nn.RMSNorm(50, eps=1e-5)
    torch.nn.init.uniform_(plain.weight)
    x = torch.randn(1, 4, 50)
    torch.testing.assert_close(FusedRMSNorm(plain, kernels, 0.0)(x), plain(x))
    torch.testing.assert_close(
        FusedRMSNorm(plain, kernels, 1.0)(x), plain(x) / plain.weight * (1 + plain.weight)
    )


@pytest.mark.parametrize(
    ("kind", "whole"), [("llama", True), ("mistral", True), ("qwen2", True), ("opt", False)]
)
def test_decoders_are_fused_where_they_are_alike(kind: str, whole: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(kind, tmp_path / kind))
    check_and_pack(model, None)
    assert any(isinstance(m, FusedDecoder) for m in model.modules()) == whole


def test_layers_with_code_of_their_own_are_not_fused(tmp_path: Path) -> None:
    """Ministral 3 scales queries by their position, from 16,384 on by default: its layers look like
    Llama's, and so do their results in every short prompt."""
    config = Ministral3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = Ministral3ForCausalLM(config)
    check_and_pack(model, None)
    assert any(isinstance(m, FusedRMSNorm) for m in model.modules())
    assert not any(isinstance(m, FusedDecoder) for m in model.modules())


def test_norms_in_float32_of_a_half_precision_model_are_left_alone(kernels: Kernels) -> None:
    plain = LlamaRMSNorm(64)
    x = torch.randn(1, 3, 64, dtype=torch.float16)
    fused = FusedRMSNorm(plain, kernels, 0.0)
    assert torch.equal(fused(x), plain(x))
    assert check_and_pack(GptOssForCausalLM(gpt_oss()).half(), None) in ("packed", "padded")


def gpt_oss() -> GptOssConfig:
    return GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )


def test_a_clamped_mlp_is_not_taken_for_a_plain_one(kernels: Kernels) -> None:
    class Clamped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x).clamp(-7, 7)
            out: torch.Tensor = self.down_proj(inner)
            return out

    config = LlamaConfig(hidden_size=64, intermediate_size=64)
    for kind, fits in ((LlamaMLP, True), (Clamped, False)):
        parent = torch.nn.Sequential(kind(config))
        for name in ("gate_proj", "up_proj", "down_proj"):
            plain = getattr(parent[0], name)
            torch.nn.init.normal_(plain.weight, std=0.02)
            setattr(parent[0], name, pack_linear(plain.weight.detach(), None, kernels))
        fuse_modules(parent, kernels)
        assert isinstance(parent[0], FusedMLP) == fits


def test_conv1d_of_gpt2_is_packed(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model("gpt2", tmp_path / "gpt2"))
    check_and_pack(model, None)
    assert not any(isinstance(m, Conv1D) for m in model.modules())
    assert any(isinstance(m, PackedLinear) for m in model.modules())


def test_without_a_compiler_there_are_none_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_kernels.__wrapped__() is None
    assert "no C++ compiler (no-such-compiler)" in caplog.text


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_switched_off", [])
    assert load_kernels.__wrapped__() is not None
    switch_off_kernels()
    assert load_kernels() is None
    load_kernels.cache_clear()


@pytest.fixture
def copying_compiler(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler whose output is a copy of the library that `kernels` has compiled."""
    compiled = library._compile(cache_folder())
    (script := tmp_path / "c++").write_text(
        f'#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && exec cp {compiled} "$2"; shift; done\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))


@pytest.mark.usefixtures("copying_compiler")
def test_a_cache_others_can_write_to_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "triptych").mkdir()
    (tmp_path / "triptych").chmod(0o777)
    assert load_kernels.__wrapped__() is not None
    assert "other users can write to" in caplog.text
    assert list((tmp_path / "triptych").iterdir()) == []


@pytest.mark.usefixtures("copying_compiler")
def test_a_user_without_a_home_compiles_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    assert load_kernels.__wrapped__() is not None
    assert "compiled anew at each start: could not determine the home" in caplog.text


def test_the_compiled_library_is_private_and_reused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_kernels.__wrapped__() is not None
    folder = tmp_path / "triptych"
    assert folder.stat().st_mode & 0o777 == 0o700
    (made,) = folder.iterdir()
    before = made.stat().st_mtime_ns
    assert load_kernels.__wrapped__() is not None
    assert [f.stat().st_mtime_ns for f in folder.iterdir()] == [before]
