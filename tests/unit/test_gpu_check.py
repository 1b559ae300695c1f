"""What the GPU check concludes from its measurements, on results that were made up."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from typing_extensions import override

from benchmarks import report as whole_report
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import kernel_speed, report, throughput, tokens
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.models import LARGE, SHAPES, small_model
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.rates import Cost, Limits, Round, summary
from benchmarks.gpu_check.recorder import Recorder, Result, failures, passed
from benchmarks.gpu_check.session import Output
from benchmarks.gpu_check.tokens import Reference, compare, generate, same_bits
from runners.text.gpu.fusing import FusedRotary
from runners.text.gpu.invariance import install_invariant_operators, remove_invariant_operators
from tests.support.gpu_parts import peer

CARD = "NVIDIA H100 80GB HBM3"


# --- results of parts, and which parts run


def result(*, state: str = "complete", ok: bool = True) -> Result:
    checks = [{"name": "a | check", "passed": ok, "detail": "0.81, at least 0.8", "bar": True}]
    return {"state": state, "checks": checks, "figures": {}, "skipped": {}, "seconds": 1.0}


class Card:
    """A machine with a GPU, whose parts end as `results` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: dict[str, Result | type[BaseException]] = {}
        self.ran: list[str] = []
        self.folder = folder
        (folder / "RESULTS.md").write_text("# Results\n\nOthers.\n")
        description = {"card": CARD, "versions": {"torch": "2"}}
        monkeypatch.setattr(gpu_check, "_describe", lambda dry: description)
        monkeypatch.setattr(gpu_check, "run", self._run)
        monkeypatch.setattr(report, "FOLDER", folder)
        monkeypatch.setattr(report, "RESULTS", folder / "RESULTS.md")

    def _run(self, part: gpu_check.Part, *_: object, **__: object) -> Result:
        key = next(key for key, known in gpu_check.PARTS.items() if known is part)
        self.ran.append(key)
        end = self.results.get(key, result())
        if isinstance(end, type):
            raise end
        return dict(end)

    def check(self, *arguments: str) -> int:
        self.ran.clear()
        return gpu_check.main(arguments)

    @property
    def parts(self) -> dict[str, Result]:
        path = self.folder / "gpu-nvidia-h100-80gb-hbm3.json"
        parts: dict[str, Result] = json.loads(path.read_text())["parts"]
        return parts


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(tmp_path, monkeypatch)


def test_parts_with_a_result_are_not_run_again(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.check("--parts", "a,c") == 0
    assert card.check("--parts", "a,b,c") == 0
    assert card.ran == ["b"]
    assert card.check("--parts", "a", "--force") == 0
    assert card.ran == ["a"]
    monkeypatch.setattr(report, "source_digest", lambda: "other sources")
    assert card.check("--parts", "a,b,c") == 0
    assert card.ran == ["a", "b", "c"]


def test_a_failed_check_fails_the_command_again_without_a_new_run(card: Card) -> None:
    card.results["b"] = result(ok=False)
    assert card.check("--parts", "a,b") == 1
    assert card.check("--parts", "a,b") == 1
    assert card.ran == []
    assert card.check("--parts", "a") == 0


def test_parts_that_did_not_end_are_run_again(card: Card) -> None:
    card.results["a"] = result(state="failed")
    assert card.check("--parts", "a,b") == 1
    card.results["a"] = result()
    assert card.check("--parts", "a,b") == 0
    assert card.ran == ["a"]


def test_an_interruption_keeps_the_parts_before_it(card: Card) -> None:
    card.results["b"] = KeyboardInterrupt
    assert card.check("--parts", "a,b,c") == 130
    assert list(card.parts) == ["a"]
    assert "| a |" in (card.folder / "RESULTS.md").read_text()
    del card.results["b"]
    assert card.check("--parts", "a,b,c") == 0
    assert card.ran == ["b", "c"]


def test_a_part_that_is_impossible_here_is_no_failure(card: Card) -> None:
    reason = {"reason": "not installed: deepspeed"}
    card.results["d"] = result(state="skipped") | {"checks": []} | reason
    assert card.check("--parts", "d") == 0
    assert "not installed: deepspeed" in (card.folder / "RESULTS.md").read_text()


def test_without_a_gpu_nothing_is_written(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_describe", lambda dry: {"card": None, "versions": {}})
    assert card.check() == 2
    assert [path.name for path in card.folder.iterdir()] == ["RESULTS.md"]


def test_results_elsewhere_leave_the_report_as_it_is(card: Card) -> None:
    before = (card.folder / "RESULTS.md").read_text()
    assert card.check("--parts", "a", "--output", str(card.folder / "other")) == 0
    assert (card.folder / "RESULTS.md").read_text() == before


def test_unknown_parts_are_refused(card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        card.check("--parts", "a,x")
    assert "choose from a, b, c, d, e, f, g" in capsys.readouterr().err


def test_a_recorder_leaves_a_complete_file_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    record = Recorder(path)
    record.figure("speed", {1: math.nan})
    assert json.loads(path.read_text())["figures"] == {"speed": {"1": None}}
    assert record.bar("share", 0.8, minimum=0.8)
    assert not record.bar("start", 31.0, maximum=30.0, unit="s")
    assert not record.bar("ratio", math.nan, minimum=1.0)
    stored = json.loads(path.read_text())
    assert stored["state"] == "running"
    assert failures(stored) == ["start: 31 s, at most 30.0", "ratio: nan, at least 1.0"]
    record.end("complete", 2.0)
    assert not passed(json.loads(path.read_text()))


# --- the report


def test_the_report_has_one_line_for_each_part(tmp_path: Path) -> None:
    path = report.file_of(CARD, tmp_path)
    entry = {"title": "kernels", "commit": "abc"}
    report.add(path, CARD, "b", result(ok=False) | entry)
    report.add(path, CARD, "a", result() | entry | {"headlines": ["5 tok/s"]})
    rows = [line for line in report.section(tmp_path).splitlines() if CARD in line]
    assert [row.split(" | ")[0] for row in rows] == ["| a", "| b"]
    assert ["passed" in rows[0], "FAILED" in rows[1]] == [True, True]
    assert "5 tok/s; a / check: 0.81, at least 0.8" in rows[0]
    assert {row.count("|") for row in rows} == {8}


def test_the_section_is_replaced_and_the_rest_remains(tmp_path: Path) -> None:
    target = tmp_path / "RESULTS.md"
    target.write_text("# Results\n\nBefore.\n")
    report.write_section(target, tmp_path)
    first = target.read_text()
    assert f"`make gpu-check`: {report.NOT_RUN}." in first
    report.write_section(target, tmp_path)
    assert target.read_text() == first
    report.add(report.file_of(CARD, tmp_path), CARD, "a", result() | {"title": "kernels"})
    report.write_section(target, tmp_path)
    text = target.read_text()
    assert text.startswith("# Results\n\nBefore.\n")
    assert report.NOT_RUN not in text
    assert text.count(report.BEGIN) == 1


def test_the_published_report_says_what_has_run() -> None:
    section = report.section()
    assert section in report.RESULTS.read_text()
    assert section in whole_report.render({})


# --- rates


def test_rates_leave_out_prompts_and_the_tail() -> None:
    measured = Round(10.0, [[11.0, 12.0, 13.0, 14.0], [12.5, 13.0, 13.5, 18.0]])
    assert measured.total_rate == 8 / 8
    assert measured.decode_rate == 4 / 1.5  # from 12.5 to 14
    assert measured.first_token == 1.75
    assert math.isnan(Round(0.0, [[1.0], [2.0]]).decode_rate)
    assert summary([measured] * 3)["rounds"] == [1.0] * 3


def test_a_step_reads_all_weights_but_the_input_embedding() -> None:
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    weights = sum(p.numel() for p in model.parameters()) - 10 * 8
    cost = Cost.of(model)
    assert cost == Cost(4 * weights, weights, kv_bytes_per_token=2 * 2 * 1 * 4 * 4)
    limits = Limits(bytes_per_second=1e6, operations_per_second=1e6)
    expected = 100 / 2 * (4 * weights + 2 * 30 * 64) / 1e6
    assert cost.bandwidth_share(100, 2, 30, limits) == pytest.approx(expected)
    assert cost.operations_share(100, limits) == pytest.approx(100 * 2 * weights / 1e6)


def test_the_large_model_has_eight_billion_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LARGE))
    assert 8.0e9 < sum(p.numel() for p in model.parameters()) < 8.1e9


@pytest.mark.parametrize("kind", SHAPES)
def test_the_small_models_have_heads_that_the_kernels_take(kind: str) -> None:
    config: Any = SHAPES[kind]()
    assert getattr(config, "head_dim", None) or config.hidden_size // config.n_head == 64


# --- what Triptych is compared with


@pytest.fixture
def replaced_operators() -> Iterator[Callable[[], None]]:
    """Replaces operators of torch on the CPU, as the first session on a GPU does there."""
    yield lambda: install_invariant_operators("cpu")
    remove_invariant_operators("cpu")


def test_no_reference_is_computed_on_replaced_operators(
    tmp_path: Path, replaced_operators: Callable[[], None]
) -> None:
    device = Device(dry=True)
    folder = small_model("llama", torch.float32, tmp_path)
    references: list[Callable[[], object]] = [
        lambda: generate(device, folder, [[2, 3]], 1),
        lambda: next(peer(device, "ends", repeat=1)),
        lambda: device.matmul_rate(),
        lambda: throughput._transformers(Context(Recorder(tmp_path / "r"), device, tmp_path), ()),
    ]
    for reference in references:
        reference()
    replaced_operators()
    for reference in references:
        with pytest.raises(RuntimeError, match="on Triptych's operators of torch for cpu"):
            reference()
    with pytest.raises(RuntimeError, match="on Triptych's operators of torch for cpu"):
        kernel_speed._linear(Context(Recorder(tmp_path / "r"), device, tmp_path))
    remove_invariant_operators("cpu")
    references[0]()


def test_no_reference_is_computed_on_replaced_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", FusedRotary(original))
    with pytest.raises(RuntimeError, match=r"functions of transformers\.models\.llama\.modeling"):
        Device(dry=True).require_stock()
    monkeypatch.undo()
    Device(dry=True).require_stock()


class TwoModels(Device):
    """A dry run of part b with two models."""

    @override
    def pick(self, real: Any, dry: Any) -> Any:
        return ["llama", "qwen3"] if real == list(SHAPES) else dry


def test_all_references_come_before_the_first_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced_operators: Callable[[], None]
) -> None:
    checked: list[str] = []

    def check_model(check: Context, case: tokens.Case, prompts: object) -> None:
        replaced_operators()
        checked.append(case.name)

    monkeypatch.setattr(tokens, "_check_model", check_model)
    context = Context(Recorder(tmp_path / "result.json"), TwoModels(dry=True), tmp_path)
    tokens.run(context)
    assert context.record.result["checks"] == []
    assert checked == ["llama float32", "qwen3 float32"]


def test_transformers_default_mode_measures_only_what_its_fastest_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def batching(device: Device, options: object, counts: Sequence[int]) -> Iterator[Any]:
        asked.append(list(counts))
        for count in counts:
            if options and count == 64:
                raise RuntimeError("no memory")
            yield count, {"tokens_per_second": 100.0 if options else 50.0}

    monkeypatch.setattr(throughput, "_continuous_batching", batching)
    context = check(tmp_path)
    monkeypatch.setattr(Device, "release", lambda self: None)
    assert throughput._transformers(context, (1, 8, 64)) == {1: 100.0, 8: 100.0, 64: 50.0}
    assert asked == [[1, 8, 64], [64]]
    assert "RuntimeError: no memory" in str(context.record.result["skipped"])


def test_a_part_short_of_time_leaves_out_its_last_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, batch_invariant: bool) -> Iterator[Any]:
        assert not batch_invariant
        yield 8, {"tokens_per_second": 200.0}

    monkeypatch.setattr(throughput, "_triptych", measure)
    limits = Limits(bytes_per_second=1.0, operations_per_second=1.0)
    for left_s, complete in ((100.0, False), (300.0, True)):
        ends = time.monotonic() + left_s
        context = Context(Recorder(tmp_path / "r"), Device(dry=False), tmp_path, ends)
        throughput._cost_of_invariance(context, tmp_path, limits, {8: 150.0}, spent_s=120.0)
        result = context.record.result
        assert (result["figures"].get("batch_invariant true, times false") == {8: 0.75}) == complete
        assert bool(result["skipped"]) != complete


# --- tokens


def check(tmp_path: Path) -> Context:
    return Context(Recorder(tmp_path / "result.json"), Device(dry=False), tmp_path)


def reference(*rows: list[float]) -> Reference:
    logits = torch.tensor(rows)
    return Reference(logits.argmax(-1).tolist(), logits)


def test_near_ties_are_allowed_in_bfloat16_only(tmp_path: Path) -> None:
    near = reference([0.0, 4.0, 3.95], [1.0, 4.0, 0.0])
    far = reference([0.0, 4.0, 3.0], [1.0, 4.0, 0.0])
    other = [Output([2, 0])]
    context = check(tmp_path)
    assert compare(context, "same", [Output([1, 1])], [near], torch.float32)
    assert compare(context, "near", other, [near], torch.bfloat16)
    assert not compare(context, "near", other, [near], torch.float32)
    assert not compare(context, "far", other, [far], torch.bfloat16)
    details = [entry["detail"] for entry in context.record.result["checks"]]
    assert details[1] == (
        "0 of 1 equal; tie: prompt 0 from token 0 on, margin 0.012 of the largest logit"
    )


def test_errors_and_short_answers_differ(tmp_path: Path) -> None:
    full = reference([0.0, 1.0], [0.0, 1.0])
    context = check(tmp_path)
    assert not compare(context, "short", [Output([1])], [full], torch.bfloat16)
    assert not compare(context, "error", [Output(error="broken")], [full], torch.bfloat16)


def test_bits_are_compared_exactly(tmp_path: Path) -> None:
    one = Output([1, 2], [(-0.1,), (-0.2,)])
    close = Output([1, 2], [(-0.1,), (math.nextafter(-0.2, 0),)])
    context = check(tmp_path)
    assert same_bits(context, "equal", [one], [one])
    assert not same_bits(context, "close", [close], [one])
    assert "from token 1 on" in context.record.result["checks"][1]["detail"]
