"""The choice of an attention backend: what proves correct on this device, and of that the fastest.

A rank does it once for each kind of layer, before it takes requests.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch

from runners.contracts.errors import ConfigError
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
from runners.text.gpu.plan import SPLIT, StepPlan, default_programs, token_slots
from runners.text.paging.blocks import BLOCK_SIZE

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""The largest difference to attention in float64, for values of a normal distribution."""
FLOAT8_SCALE = 0.02
GAIN = 1.1
"""A backend takes the place of one before it if it is faster by this factor: a choice that depends
on less would be another one at each start."""
TIMED_BYTES = 1 << 28
"""Bytes of the keys and values that are read in a timed call, more than fits a cache."""
REPETITIONS = 10

SEQUENCES = (1, 31, 32, 33, 64, 255, 256, 257, 600)
"""Lengths at the borders of pages and of splits."""
FEW_SEQUENCES = (1, 33, 70)
"""For the interpreter, which takes milliseconds for what a GPU does in a microsecond."""

Rows = tuple[int, int, int]
"""Rows of a sequence in a step: its index, the position of the first and that after the last."""


def choose_backend(
    shapes: Collection[AttentionShape],
    device: torch.device,
    requested: str = "auto",
    *,
    programs: int = 0,
) -> Backend:
    """The backend for layers of all these shapes, which share a plan: the fastest that proves
    correct for each, or the one requested.

    `requested` is auto, triton, varlen or torch. On a CPU, auto is torch. `programs` is that of the
    `StepPlan` (0: `default_programs`).
    Raises: ConfigError if the requested backend cannot be used or proves wrong.
    """
    candidates = [each for each in _candidates(device) if requested in ("auto", each.name)]
    if not candidates:
        raise ConfigError(f"unknown attention backend {requested}", field="attention_kernel")
    if requested == "auto" and device.type != "cuda":
        return TorchBackend()
    notes, chosen, best = [], None, 0.0
    for candidate in candidates:
        if chosen is not None and candidate.name == "torch":
            break
        times = []
        for shape in shapes:
            per_head = programs or default_programs(device, shape.kv_heads)
            problem = candidate.obstacle(shape, device) or find_error(
                candidate, shape, device, per_head
            )
            if problem is not None:
                notes.append(f"{_label(candidate)}: {problem}")
                break
            if device.type == "cuda":
                times.append(time_calls(candidate, shape, device, per_head))
        else:
            if device.type != "cuda":
                return candidate
            decode, prefill = map(sum, zip(*times, strict=True))
            notes.append(f"{_label(candidate)}: {decode:.3f} ms decoding, {prefill:.3f} ms prefill")
            if chosen is None or decode + prefill < best / GAIN:
                chosen, best = candidate, decode + prefill
    if chosen is None:
        raise ConfigError(f"no attention kernel: {'; '.join(notes)}", field="attention_kernel")
    logger.info("attention: %s (%s)", _label(chosen), "; ".join(notes))
    return chosen


def find_error(
    backend: Backend, shape: AttentionShape, device: torch.device, programs: int
) -> str | None:
    """What is wrong with the attention of random sequences, if anything.

    It is compared with attention in float64. Then the same rows, alone, in a batch, decoded one by
    one, in chunks, and with and without partial results, must have the same bits.
    """
    lengths = FEW_SEQUENCES if device.type != "cuda" else SEQUENCES
    windows = [None] if shape.window is None else [None, 40]
    try:
        case = Case(shape, device, lengths, backend.tiles, programs)
        for window in windows:
            if (problem := _compare(case, backend, window)) is not None:
                return problem
    except Exception as error:
        # Of a kernel that does not compile, takes too much shared memory, or does not take these
        # arguments. Triton's errors have no base in common with torch's.
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _compare(case: Case, backend: Backend, window: int | None) -> str | None:
    options = case.options(window)
    whole = case.whole()
    expected = case.attend(backend, whole, options)
    difference = (expected.double() - case.reference(whole, options)).abs().max().item()
    # Not `difference > tolerance`, which is false for NaN.
    if not difference <= TOLERANCE[case.shape.dtype]:
        return f"differs by {difference:.2g} from float64"
    offsets = np.cumsum([0, *(last - first for _, first, last in whole)])
    for what, steps, capacity in case.ways():
        for step in steps:
            starts = [offsets[i] + first - whole[i][1] for i, first, _ in step]
            counts = [last - first for _, first, last in step]
            same = torch.cat([expected[a : a + n] for a, n in zip(starts, counts, strict=True)])
            if not torch.equal(case.attend(backend, step, options, capacity), same):
                return f"other bits {what}"
    return None


class Case:
    """Random sequences whose keys and values are in pages in random order, among NaN."""

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        lengths: Sequence[int],
        tiles: tuple[int, int],
        programs: int = 2,
    ) -> None:
        self.shape, self.device, self.lengths = shape, device, lengths
        self.tiles, self.programs = tiles, programs
        # In the interpreter sequences are too short for splits of the usual size.
        self.split = SPLIT if device.type == "cuda" else 64
        generator = torch.Generator(device).manual_seed(0)
        total, width = sum(lengths), max(-(-n // BLOCK_SIZE) for n in lengths)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device).to(shape.dtype)

        # As models have it: one head after the other.
        self.query = random(shape.heads, total, shape.key_size).transpose(0, 1)
        key, value = (random(total, shape.kv_heads, n) for n in (shape.key_size, shape.value_size))
        self.sinks = random(shape.heads) if shape.has_sinks else None
        # Page 0 belongs to nothing, as that of a pool which is reserved for padding.
        order = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(0))
        self.tables = (order + 1).view(len(lengths), width).numpy().astype(np.int32)
        self.pages = _pages(shape, device, len(order) + 1)
        slots = token_slots(lengths, lengths, self.tables)
        self.pages.write(key, value, torch.as_tensor(slots, device=device))
        if shape.kv_dtype == FLOAT8:
            key, value = (_rounded(each) for each in (key, value))
        self._key, self._value = key, value

    def options(self, window: int | None = None) -> AttentionOptions:
        """The options of a layer with this window."""
        return AttentionOptions(self.shape.key_size**-0.5, window, self.shape.softcap, self.sinks)

    def whole(self) -> list[Rows]:
        """The rows that are compared: all, or in the interpreter the last ones."""
        rows = max(self.lengths) if self.device.type == "cuda" else 20
        return [(i, max(0, n - rows), n) for i, n in enumerate(self.lengths)]

    def ways(self) -> Iterator[tuple[str, list[list[Rows]], int]]:
        """Steps that must give the bits of all sequences in one step, and slots for them."""
        last: list[Rows] = [(i, n - 1, n) for i, n in enumerate(self.lengths)]
        chunks: list[list[Rows]] = []
        longest = max(range(len(self.lengths)), key=lambda i: self.lengths[i])
        _, start, end = self.whole()[longest]
        size = 37 if self.device.type == "cuda" else 11
        for first in range(start, end, size):
            chunks.append([(longest, first, min(first + size, end)), *last[:2]])
        slots = 4096 if self.device.type == "cuda" else 256
        yield "when decoding", [last], slots
        yield "when decoding without partial results", [last], 0
        yield "alone", [[each] for each in last], slots
        yield "in chunks", chunks, slots

    def attend(
        self, backend: Backend, rows: Sequence[Rows], options: AttentionOptions, capacity: int = 0
    ) -> torch.Tensor:
        """What a backend computes for rows, `[T, heads, value_size]`."""
        plan = self.plan(rows, capacity)
        query = torch.cat([self._rows(self.query, each) for each in rows])
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
        out = torch.full(
            (len(query), self.shape.heads, self.shape.value_size),
            float("nan"),
            dtype=self.shape.dtype,
            device=self.device,
        )
        backend.attend(query, self.pages, plan, out, options)
        return out

    def plan(self, rows: Sequence[Rows], capacity: int) -> StepPlan:
        """The plan of a step with these rows."""
        counts = [last - first for _, first, last in rows]
        plan = StepPlan(
            self.device,
            max_rows=sum(counts),
            max_sequences=len(rows),
            max_table=self.tables.shape[1],
            group=self.shape.group,
            record_size=self.shape.heads * (self.shape.value_size + 2),
            capacity=capacity,
            prefill_tile=self.tiles[1],
            programs=self.programs,
            split=self.split,
        )
        # What an earlier step left there must not be read.
        plan.scratch.fill_(float("nan"))
        plan.fill(counts, [last for _, _, last in rows], self.tables[[i for i, _, _ in rows]])
        return plan

    def reference(self, rows: Sequence[Rows], options: AttentionOptions) -> torch.Tensor:
        """Attention in float64."""
        return torch.cat([self._reference(each, options) for each in rows])

    def _reference(self, rows: Rows, options: AttentionOptions) -> torch.Tensor:
        index, first, last = rows
        query = self._rows(self.query, rows).double()
        key, value = (
            self._rows(each, (index, 0, last)).double().repeat_interleave(self.shape.group, 1)
            for each in (self._key, self._value)
        )
        logits = torch.einsum("thd,nhd->htn", query, key) * options.scale
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        column = torch.arange(last, device=self.device)
        row = torch.arange(first, last, device=self.device)[:, None]
        visible = column <= row
        if options.window is not None:
            visible &= column > row - options.window
        logits = logits.masked_fill(~visible, float("-inf"))
        if options.sinks is not None:
            sinks = options.sinks.double()[:, None, None].expand(-1, last - first, 1)
            logits = torch.cat([logits, sinks], -1)
        return torch.einsum("htn,nhd->thd", logits.softmax(-1)[..., :last], value)

    def _rows(self, tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
        index, first, last = rows
        start = sum(self.lengths[:index])
        return tensor[start + first : start + last]


def time_calls(
    backend: Backend, shape: AttentionShape, device: torch.device, programs: int
) -> tuple[float, float]:
    """Milliseconds of one layer on a GPU: 128 sequences that decode, and a chunk of 2,048 rows.

    Infinite where the GPU lacks the memory to try.
    """
    sizes = (shape.key_size + shape.value_size) * shape.kv_heads * shape.kv_dtype.itemsize
    length = min(2048, max(256, TIMED_BYTES // sizes // 128))
    try:
        case = Case(shape, device, [length] * 128, backend.tiles, programs)
    except torch.OutOfMemoryError:
        return float("inf"), float("inf")
    decode: list[Rows] = [(i, length - 1, length) for i in range(128)]
    prefill: list[Rows] = [(i, 0, length) for i in range(max(1, 2048 // length))]
    window = shape.window
    return (
        _time(case, backend, decode, case.options(window)),
        _time(case, backend, prefill, case.options(window)),
    )


def _time(case: Case, backend: Backend, rows: Sequence[Rows], options: AttentionOptions) -> float:
    plan = case.plan(rows, capacity=4096)
    query = torch.cat([case.query[first:last] for _, first, last in rows])
    out = query.new_empty(len(query), case.shape.heads, case.shape.value_size)
    return milliseconds(lambda: backend.attend(query, case.pages, plan, out, options))


def milliseconds(function: Callable[[], object]) -> float:
    """The median time of a call on the GPU."""
    function()
    create: Callable[..., torch.cuda.Event] = torch.cuda.Event
    events = [create(enable_timing=True) for _ in range(REPETITIONS + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in itertools.pairwise(events)]))


def _candidates(device: torch.device) -> list[Backend]:
    if device.type != "cuda":
        # The interpreter multiplies with NumPy, where a row's bits do not depend on its place in a
        # product of up to 8 rows.
        return [TritonBackend((8, 8)), VarlenBackend(), TorchBackend()]
    tiles = [(64, 64), (64, 128), (16, 64), (16, 128), (16, 16)]
    return [*(TritonBackend(each) for each in tiles), VarlenBackend(), TorchBackend()]


def _label(backend: Backend) -> str:
    return f"{backend.name} {backend.tiles}" if backend.name == "triton" else backend.name


def _pages(shape: AttentionShape, device: torch.device, count: int) -> KVPages:
    keys, values = (
        torch.full((count, BLOCK_SIZE, shape.kv_heads, size), float("nan"), device=device)
        for size in (shape.key_size, shape.value_size)
    )
    scale = FLOAT8_SCALE if shape.kv_dtype == FLOAT8 else 1.0
    return KVPages(keys.to(shape.kv_dtype), values.to(shape.kv_dtype), scale, scale)


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    """What pages in float8 keep of numbers."""
    return (rows.float() / FLOAT8_SCALE).to(FLOAT8).float() * FLOAT8_SCALE
