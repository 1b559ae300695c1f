"""Attention of the GPU path on a CPU: its kernel in Triton's interpreter, and torch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import OutOfResources

from runners.contracts.errors import ConfigError
from runners.text.gpu import kernels, proof
from runners.text.gpu.attention import (
    FLOAT8,
    AttentionOptions,
    AttentionShape,
    Backend,
    KVPages,
    TorchBackend,
    TritonBackend,
    VarlenBackend,
)
from runners.text.gpu.plan import StepPlan
from runners.text.gpu.proof import Case, Rows, choose_backend, find_error

CPU = torch.device("cpu")
KERNEL = TritonBackend()
SMALL_TILES = TritonBackend((8, 8))
"""NumPy, which multiplies in the interpreter, gives a row the same bits in any place of 8 rows."""
BORDERS = (1, 31, 32, 33, 64, 255, 256, 257)


def shape(
    heads: int = 4,
    kv_heads: int = 2,
    key_size: int = 32,
    value_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
) -> AttentionShape:
    size = key_size if value_size is None else value_size
    sizes = heads, kv_heads, key_size, size
    return AttentionShape(*sizes, dtype, kv_dtype or dtype, window, softcap, has_sinks)


@pytest.mark.parametrize(
    "layer",
    [
        shape(1, 1, 64),
        shape(3, 1, 32, window=40),
        shape(7, 1, 80, softcap=5.0),
        shape(16, 1, 32, 16, has_sinks=True),
        shape(20, 1, 32),  # more heads than a tile takes
        shape(6, 2, 96, 40, window=40, softcap=5.0, has_sinks=True),
        shape(2, 1, 256, dtype=torch.bfloat16),
        shape(2, 1, 72, dtype=torch.float16, window=100, softcap=30.0),
        shape(4, 2, 64, dtype=torch.bfloat16, has_sinks=True, window=128),
        shape(2, 1, 64, dtype=torch.bfloat16, kv_dtype=FLOAT8),
    ],
    ids=str,
)
def test_the_kernel_computes_attention(layer: AttentionShape) -> None:
    """Of decoding rows and a chunk in one step, among NaN."""
    lengths = (1, 33, 130)
    rows: list[Rows] = [(0, 0, 1), (1, 32, 33), (2, 60, 67), (2, 129, 130)]
    _assert_close(layer, lengths, rows, capacity=64)


@pytest.mark.parametrize("capacity", [0, 64])
def test_the_kernel_at_borders_of_pages_and_splits(capacity: int) -> None:
    rows: list[Rows] = [(i, max(0, n - 2), n) for i, n in enumerate(BORDERS)]
    rows[3:3] = [(7, 40, 43)]
    _assert_close(shape(2, 1, 16), BORDERS, rows, capacity)


def _assert_close(
    layer: AttentionShape, lengths: Sequence[int], rows: Sequence[Rows], capacity: int
) -> None:
    case = Case(layer, CPU, lengths, KERNEL.tiles)
    out = case.attend(KERNEL, rows, case.options(layer.window), capacity)
    expected = case.reference(rows, case.options(layer.window))
    tolerance = proof.TOLERANCE[layer.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", [SMALL_TILES, TorchBackend()], ids=lambda b: b.name)
@pytest.mark.parametrize(
    "layer",
    [
        shape(4, 1, window=40, softcap=5.0, has_sinks=True),
        shape(3, 1, 80, 48, torch.bfloat16),
        shape(1, 1, 32, dtype=torch.bfloat16, kv_dtype=FLOAT8),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_in_any_step(layer: AttentionShape, backend: Backend) -> None:
    assert find_error(backend, layer, CPU, programs=2) is None


def test_a_decoded_row_has_the_bits_of_its_prompt_behind_a_window() -> None:
    """Programs leave out other splits and tiles for a chunk than for one row."""
    case = Case(shape(2, 1), CPU, [300], SMALL_TILES.tiles)
    options = case.options(window=70)
    whole = case.attend(SMALL_TILES, [(0, 190, 300)], options)
    for position in (190, 255, 256, 269, 299):
        for capacity in (0, 64):
            row = case.attend(SMALL_TILES, [(0, position, position + 1)], options, capacity)
            assert torch.equal(row[0], whole[position - 190])


def test_what_a_window_hides_is_not_read() -> None:
    case = Case(shape(dtype=torch.bfloat16), CPU, [200], KERNEL.tiles)
    options = case.options(window=30)
    rows: list[Rows] = [(0, 198, 200), (0, 199, 200)]
    expected = case.attend(KERNEL, rows, options, 64)
    # A tile of keys begins in the page before the window, with number 4.
    case.pages.keys[case.tables[0, :5]] = float("nan")
    case.tables[0, :5] = 2**30  # pages that were freed have no number
    assert torch.equal(case.attend(KERNEL, rows, options, 64), expected)


def test_padding_changes_nothing() -> None:
    """A graph has a fixed number of rows: segments of length 1 fill them, on a page for that."""
    case = Case(shape(), CPU, [70, 33], SMALL_TILES.tiles)
    rows: list[Rows] = [(0, 69, 70), (1, 32, 33)]
    expected = case.attend(SMALL_TILES, rows, case.options(), 64)
    plan = case.plan([*rows, (0, 0, 1), (0, 0, 1)], 64)
    plan.fill([1, 1, 1, 1], [70, 33, 1, 1], np.concatenate([case.tables, 0 * case.tables]))
    query = torch.cat([case._rows(case.query, each) for each in [*rows, rows[0], rows[0]]])
    out = torch.zeros(4, 4, 32)
    SMALL_TILES.attend(query, case.pages, plan, out, case.options())
    assert torch.equal(out[:2], expected)


@pytest.mark.parametrize("backend", [KERNEL, TorchBackend()], ids=lambda b: b.name)
def test_a_call_is_one_operator_in_inference_mode(backend: Backend) -> None:
    """A graph that is recorded on a CPU has this operator, whose tensors are all arguments."""
    names: list[str] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            names.append(str(function))
            return function(*arguments, **(options or {}))

    with torch.inference_mode():
        case = Case(shape(), CPU, [40], backend.tiles)
        plan = case.plan([(0, 39, 40)], 8)
        out = torch.zeros(1, 4, 32)
        with Recording():
            backend.attend(case.query[39:40], case.pages, plan, out, case.options())
    operators = [name for name in names if not name.startswith("aten.slice")]
    assert len(operators) == 1
    assert operators[0].startswith("triptych.")
    assert out.abs().sum() > 0


# Pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_written_by_kernel_and_by_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = torch.randn(3, 40, 24, dtype=dtype).transpose(0, 1)  # strided
    value = torch.randn(40, 3, 20, dtype=dtype)
    slots = torch.randperm(96)[:40]

    def write() -> KVPages:
        pages = KVPages(torch.zeros(3, 32, 3, 24).to(dtype), torch.zeros(3, 32, 3, 20).to(dtype))
        pages.write(key, value, slots)
        return pages

    by_kernel = write()
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    by_torch = write()
    assert torch.equal(by_kernel.keys.flatten(0, 1)[slots], key)
    assert torch.equal(by_kernel.values.flatten(0, 1)[slots], value)
    assert torch.equal(by_kernel.keys, by_torch.keys)
    assert torch.equal(by_kernel.values, by_torch.values)


def test_float8_pages_are_clamped() -> None:
    pages = KVPages(
        torch.zeros(1, 32, 1, 2).to(FLOAT8), torch.zeros(1, 32, 1, 2).to(FLOAT8), 0.5, 2.0
    )
    rows = torch.tensor([[[1.0, 1e4]]])
    pages.write(rows, rows, torch.tensor([5]))
    assert pages.keys[0, 5, 0].float().tolist() == [2.0, 448.0]
    assert pages.values[0, 5, 0].float().tolist() == [0.5, 448.0]


# The choice


def test_the_choice_on_a_cpu() -> None:
    assert choose_backend([shape()], CPU).name == "torch"
    assert choose_backend([shape(2, 1, 16)], CPU, "triton") == SMALL_TILES


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        choose_backend([shape()], CPU, "triton")


@pytest.mark.parametrize(
    ("requested", "reason"), [("varlen", "CUDA only"), ("magic", "unknown attention backend magic")]
)
def test_a_backend_that_cannot_be_used_is_refused(requested: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        choose_backend([shape()], CPU, requested)


def test_obstacles() -> None:
    assert "256" in str(KERNEL.obstacle(shape(key_size=288), CPU))
    assert "float64" in str(KERNEL.obstacle(shape(dtype=torch.float64), CPU))
    assert TorchBackend().obstacle(shape(key_size=288), CPU) is None
    assert not TorchBackend().capturable
    gpu = torch.device("cuda", 0)
    varlen = VarlenBackend()
    assert varlen.obstacle(shape(dtype=torch.bfloat16, window=9), gpu) is None
    for layer in (
        shape(),
        shape(dtype=torch.bfloat16, has_sinks=True),
        shape(dtype=torch.bfloat16, softcap=5.0),
        shape(dtype=torch.bfloat16, kv_dtype=FLOAT8),
        shape(dtype=torch.bfloat16, value_size=16),
    ):
        assert varlen.obstacle(layer, gpu) is not None


@dataclasses.dataclass(frozen=True)
class BrokenBackend(TorchBackend):
    """Attention with an error."""

    error: str = ""

    def attend(
        self,
        query: torch.Tensor,
        pages: KVPages,
        plan: StepPlan,
        out: torch.Tensor,
        options: AttentionOptions,
    ) -> None:
        if self.error == "raises":
            raise OutOfResources(300_000, 232_448, "shared memory")
        super().attend(query, pages, plan, out, options)
        if self.error == "nan":
            out[0, 0, 0] = float("nan")
        if self.error == "value":
            out += 0.01
        if self.error == "bits":
            out += 1e-6 * plan.sequences


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        ("raises", "OutOfResources: out of resource: shared memory"),
        ("nan", "differs by nan"),
        ("value", "differs by 0.01"),
        ("bits", "other bits alone"),
    ],
)
def test_errors_of_a_backend_are_discovered(error: str, problem: str) -> None:
    result = find_error(BrokenBackend(error=error), shape(2, 1, 16), CPU, programs=1)
    assert str(result).startswith(problem)


def test_the_fastest_correct_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a difference of less than ten percent does not count."""
    gpu = torch.device("cuda", 0)
    problems = {(64, 128): "other bits alone"}
    times = {(64, 64): 2.0, (16, 64): 1.9, (16, 128): 1.0, (16, 16): 3.0}
    candidates: Sequence[Backend] = [
        *(TritonBackend(tiles) for tiles in ((64, 64), (64, 128), (16, 64), (16, 128), (16, 16))),
        TorchBackend(),
    ]
    monkeypatch.setattr(proof, "_candidates", lambda device: candidates)
    monkeypatch.setattr(TritonBackend, "obstacle", lambda *_: None)
    monkeypatch.setattr(proof, "find_error", lambda backend, *_: problems.get(backend.tiles))
    monkeypatch.setattr(proof, "time_calls", lambda backend, *_: (times[backend.tiles] / 2,) * 2)
    assert choose_backend([shape()], gpu, programs=1) == TritonBackend((16, 128))
    times[16, 128] = 1.85
    assert choose_backend([shape()], gpu, programs=1) == TritonBackend((64, 64))
    problems |= dict.fromkeys(times, "other bits alone")
    monkeypatch.setattr(proof, "time_calls", lambda *_: (9.0, 9.0))
    problems.pop((64, 64))
    assert choose_backend([shape()], gpu, programs=1) == TritonBackend((64, 64))
