"""The paged engine on real models: which forward each architecture gets, and that it is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MambaConfig, MambaForCausalLM

from runners.contracts.errors import ConfigError, EngineFailure
from runners.text import attention, model_runner, parity
from runners.text.cpu.linear import PackedLinear
from runners.text.engine import PagedEngine
from runners.text.gpu.model_runner import GPUModelRunner
from runners.text.model_runner import HFModelRunner
from runners.text.parity import ParityCheck, check_and_pack
from tests.support.models import CONFIGS, greedy, write_model
from tests.support.scheduling import COUNT, Run, load, runner_of, sequence

PROMPTS = [[5, 6, 7], [9] * 30, [11], list(range(20, 70))]
NOT_CAPTURED = {"longcat_flash"}
"""Their forwards wait for a value: they run without graphs."""
PADDED = {"bloom", "gptj", "gpt_neo", "mpt", "falcon", "falcon_mq", "qwen2_moe", "llama4_text"}


@pytest.fixture(params=["kernels", "torch", "pages"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether our kernels run, what runs without a compiler, or the path of a GPU."""
    if request.param == "torch":
        for module in (attention, parity):
            monkeypatch.setattr(module, "load_kernels", lambda: None)
    return str(request.param)


def load_on(operators: str, folder: Path, **options: Any) -> PagedEngine:
    kernel = "torch" if operators == "pages" else "auto"
    return load(folder, attention_kernel=kernel, **options)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_mixed_chunked_steps_equal_generate(kind: str, operators: str, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / kind)
    engine = load_on(operators, folder)
    runner = runner_of(engine)
    if isinstance(runner, HFModelRunner):
        assert runner.layout == ("padded" if kind in PADDED else "packed")
    assert isinstance(runner, GPUModelRunner) == (operators == "pages" and kind not in PADDED)
    assert engine.overlaps == (operators == "pages")
    packed = any(isinstance(m, PackedLinear) for m in runner_of(engine).model.modules())
    assert packed == (operators == "kernels")
    run = Run(engine)
    for i, prompt in enumerate(PROMPTS):
        run.scheduler.add(sequence(str(i), prompt))
        run.step()  # the next one joins a step later
    run.drain()
    expected = greedy(folder, PROMPTS, COUNT)
    assert [run.tokens[str(i)] for i in range(len(PROMPTS))] == expected
    if isinstance(runner, GPUModelRunner):
        assert runner.graphs is not None
        assert bool(len(runner.graphs)) == (kind not in NOT_CAPTURED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "bloom", "mixtral"])
def test_sixteen_bit_weights_equal_generate_in_float32(
    kind: str, dtype: torch.dtype, operators: str, tmp_path: Path
) -> None:
    folder = write_model(kind, tmp_path / kind, dtype=dtype)
    engine = load_on(operators, folder)
    linears = [m for m in runner_of(engine).model.modules() if isinstance(m, PackedLinear)]
    types = {linear.packed.dtype for linear in linears}
    assert types == ({dtype} if operators == "kernels" else set())
    run = Run(engine)
    for i, prompt in enumerate(PROMPTS):
        run.scheduler.add(sequence(str(i), prompt))
    run.drain()
    expected = greedy(folder, PROMPTS, COUNT)
    assert [run.tokens[str(i)] for i in range(len(PROMPTS))] == expected


def test_a_model_in_half_precision_may_still_be_batched(tmp_path: Path) -> None:
    """As on a GPU: nobody said that it is to compute in float32."""
    folder = write_model("llama", tmp_path / "llama", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert check_and_pack(model, None) == "packed"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_model_that_ignores_its_cache_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model("bloom", tmp_path / "bloom"))
    plain = model.forward

    def forgetful(**kwargs: object) -> object:
        kwargs.pop("past_key_values", None)
        kwargs.pop("attention_mask", None)
        return plain(**kwargs)

    model.forward = forgetful
    with pytest.raises(ConfigError, match="cannot be batched continuously"):
        ParityCheck(model).choose_layout()


def test_the_check_reaches_what_only_long_sequences_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4 scales the queries of a whole batch by one length, from 8,192 tokens on."""
    config = CONFIGS["llama4_text"]()
    config.floor_scale, config.attn_scale = 8192, 0.1
    monkeypatch.setitem(CONFIGS, "llama4_text", lambda: config)
    folder = write_model("llama4_text", tmp_path / "llama4")
    ParityCheck(AutoModelForCausalLM.from_pretrained(folder)).choose_layout()
    monkeypatch.setattr(model_runner, "scaled_by_length", lambda _: iter(()))
    with pytest.raises(ConfigError, match="its logits with a KV cache differ"):
        ParityCheck(AutoModelForCausalLM.from_pretrained(folder)).choose_layout()


def test_a_state_space_model_is_refused_with_a_sentence() -> None:
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ConfigError, match="MambaForCausalLM cannot be batched continuously"):
        ParityCheck(MambaForCausalLM(config)).choose_layout()


def test_a_model_whose_packed_layers_change_it_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model("llama", tmp_path / "llama")
    whole = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: whole(self, x) * 1.01)
    engine = load(folder)
    assert not any(isinstance(m, PackedLinear) for m in runner_of(engine).model.modules())
    run = Run(engine)
    run.scheduler.add(sequence("only", PROMPTS[1]))
    run.drain()
    assert run.tokens["only"] == greedy(folder, [PROMPTS[1]], COUNT)[0]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_one_sequence_that_overflows_ends_alone(kind: str, operators: str, tmp_path: Path) -> None:
    """Its KV is NaN; neither its neighbours nor who gets its blocks afterwards may see that."""
    folder = write_model(kind, tmp_path / kind)
    engine = load_on(operators, folder, kv_tokens=4 * 32, prefix_caching=False)
    broken = 319

    def overflow(_: object, inputs: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((inputs[0] == broken)[..., None], float("nan"))

    runner_of(engine).model.get_input_embeddings().register_forward_hook(overflow)
    run = Run(engine, max_step_tokens=64)
    run.scheduler.add(sequence("bad", [broken] * 20))
    run.scheduler.add(sequence("good", PROMPTS[0]))
    run.drain()
    assert run.failed == [("bad", EngineFailure)]
    for i in range(3):
        run.scheduler.add(sequence(f"after {i}", PROMPTS[0]))
        run.drain()
    expected = greedy(folder, PROMPTS[:1], COUNT)[0]
    assert run.tokens == dict.fromkeys(["good", "after 0", "after 1", "after 2"], expected)


def test_int8_weights_follow_the_model_closely(tmp_path: Path) -> None:
    folder = write_model("llama", tmp_path / "llama")
    exact, rounded = load(folder), load(folder, quantization="int8")
    logits = []
    for engine in (exact, rounded):
        engine.open(0, PROMPTS[3])
        assert engine.extend(0, len(PROMPTS[3]))
        logits.append(engine.put([0], [PROMPTS[3]]))
    difference = (logits[0] - logits[1]).abs().max() / logits[0].std()
    assert 1e-4 < difference < 0.1


def test_int8_without_a_compiler_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "load_kernels", lambda: None)
    with pytest.raises(ConfigError, match="could not be compiled"):
        load(write_model("llama", tmp_path / "llama"), quantization="int8")


def test_sinks_and_soft_caps_are_right_in_both(operators: str, tmp_path: Path) -> None:
    """GPT-OSS has attention sinks and windows; Gemma 2 soft caps (in CONFIGS)."""
    config = GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.fill_(1.5)
    assert ParityCheck(model).choose_layout() == "packed"
