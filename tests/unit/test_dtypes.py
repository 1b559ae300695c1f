"""16-bit weights on a CPU: stored in 16 bits, rounded to their type, computed in float32."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runners.config.files import load_setup_config
from runners.engines import tasks
from runners.engines.accelerate import load_model
from runners.hf.dtypes import (
    cast_to_float32,
    choose_dtype,
    compute_in_float32,
    log_dtypes,
    weight_dtype,
)
from runners.rank.program import RankContext
from runners.text.cpu.fusing import FusedMLP
from runners.text.cpu.linear import PackedLinear
from runners.text.loading import prepare_model
from runners.text.parity import check_and_pack
from tests.support.models import write_model
from tests.support.task_models import write_task_model

TYPES = [torch.bfloat16, torch.float16]
IDS = torch.arange(3, 40)[None]


def types_of(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.train(False)(IDS).logits
    return logits


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mixtral", "longcat_flash"])
def test_a_layer_is_in_float32_while_it_computes(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write_model(kind, tmp_path / kind, dtype=dtype)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder).float())
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    loaded = types_of(layers)
    assert dtype in loaded
    compute_in_float32(model)
    assert torch.equal(logits_of(model), expected)
    assert types_of(layers) == loaded, "16 bits again when it has computed"
    assert types_of(model.get_input_embeddings()) == {torch.float32}
    assert weight_dtype(model) == dtype
    with pytest.raises((RuntimeError, TypeError)):
        layers[0](torch.zeros(1, 1, 3))
    assert types_of(layers) == loaded, "after a failure too"
    cast_to_float32(model)
    assert types_of(model) == {torch.float32}
    assert torch.equal(logits_of(model), expected)
    assert weight_dtype(model) == dtype


@pytest.mark.parametrize("dtype", TYPES)
def test_a_layer_that_takes_the_place_of_another_is_cast_too(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """As when a model is split over ranks."""
    model = AutoModelForCausalLM.from_pretrained(write_model("llama", tmp_path / "m", dtype=dtype))
    compute_in_float32(model)
    expected = logits_of(model)
    head = torch.nn.Linear(64, 320, bias=False, dtype=dtype)
    head.weight = model.lm_head.weight
    model.lm_head = head
    compute_in_float32(model)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize(
    ("stored", "dtype", "packed"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "float16", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.bfloat16),
    ],
)
def test_every_type_gets_the_kernels(
    stored: torch.dtype, dtype: str, packed: torch.dtype, tmp_path: Path
) -> None:
    folder = write_model("llama", tmp_path / "llama", dtype=stored)
    config: Any = load_setup_config(folder, name="m", overrides={"dtype": dtype})[0]
    model = load_model(config, tmp_path)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float()
    assert torch.equal(logits_of(model), logits_of(rounded))
    check_and_pack(model, None)
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert {linear.packed.dtype for linear in linears} == {packed}
    assert isinstance(model.lm_head, PackedLinear)
    assert any(isinstance(m, FusedMLP) for m in model.modules())
    assert types_of(model) == {torch.float32}


@pytest.mark.parametrize("dtype", TYPES)
def test_sixteen_bit_weights_may_be_quantized(dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model("llama", tmp_path / "m", dtype=dtype))
    compute_in_float32(model)
    check_and_pack(model, "int8")
    assert isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.packed.dtype == torch.int8


def test_weights_on_disk_are_rounded_and_computed_in_float32(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama", dtype=torch.bfloat16)
    overrides = {"device_map": "disk", "offload_folder": "offload"}
    for dtype in ("auto", "float16"):
        config: Any = load_setup_config(folder, name="m", overrides=overrides | {"dtype": dtype})[0]
        model = load_model(config, tmp_path)
        assert any(parameter.is_meta for parameter in model.parameters())
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float()
        assert torch.equal(logits_of(model), logits_of(rounded))


def test_float32_is_read_as_stored_only_if_all_of_it_has_one_type(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama", dtype=torch.float16)
    assert choose_dtype("float32", folder, on_cpu=True) == torch.float16
    assert choose_dtype("float32", folder, on_cpu=False) == torch.float32
    assert choose_dtype("float16", folder, on_cpu=True) == torch.float16
    assert choose_dtype("auto", folder, on_cpu=True) == "auto"
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert choose_dtype("float32", folder, on_cpu=True) == torch.float32


@pytest.mark.parametrize("kernels", [True, False])
def test_a_note_says_what_is_computed_and_what_takes_more_memory(
    kernels: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr("runners.text.parity.load_kernels", lambda: None)
    caplog.set_level(logging.INFO, "triptych.hf")
    folder = write_model("llama", tmp_path / "llama", dtype=torch.bfloat16)
    config: Any = load_setup_config(folder, name="tiny", overrides={"max_kv_tokens": 64})[0]
    model = load_model(config, tmp_path)
    prepare_model(model, config)
    wide = sum(p.nbytes for p in model.parameters()) / 2**20
    assert (wide > 0.3) != kernels, "only the embedding and the norms remain"
    assert caplog.messages == [
        "tiny: on this CPU the weights are bfloat16 and the arithmetic is float32; "
        f"{wide:.0f} MiB of the weights are kept in float32"
    ]
    caplog.clear()
    log_dtypes("tiny", AutoModelForCausalLM.from_pretrained(folder).float())
    assert not caplog.messages


def test_a_task_model_is_computed_in_float32(tmp_path: Path) -> None:
    folder = write_task_model("text-classification", tmp_path)
    config: Any = load_setup_config(folder, name="m", overrides={"dtype": "float16"})[0]
    context = RankContext(
        config=config, rank=0, num_threads=1, work_dir=tmp_path, emit=lambda _: None
    )
    program: Any = tasks.load_program(context)
    model = program._task._model
    assert types_of(model) == {torch.float32}
    assert program.info.dtype == "float16"
    rounded = type(model).from_pretrained(folder, dtype=torch.float16).float()
    assert torch.equal(logits_of(model), logits_of(rounded))
