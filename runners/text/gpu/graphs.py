"""Graphs of steps: a step's launches, recorded once and replayed without Python.

`GPUModelRunner` captures one graph for each shape that it pads steps to. On a GPU a graph is a CUDA
graph. On a CPU, where tests run, it is the list of operators that torch dispatched: like a CUDA
graph it reads the same tensors at each replay, runs none of the model's Python, and refuses
operators that wait for a value. (It does not see a `tolist`, which dispatches none on a CPU.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from runners.contracts.errors import first_line

logger = logging.getLogger("triptych.text")

Key = TypeVar("Key")
Forward = Callable[[], torch.Tensor]

WAITING = frozenset(
    {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal"}
)
"""Operators that need a value on the host, which a capture on a GPU cannot give."""


class CaptureError(Exception):
    """A step that cannot be captured."""


class Graph(Protocol):
    """One captured step."""

    @property
    def output(self) -> torch.Tensor:
        """What the step returned; a replay overwrites it."""
        ...

    def replay(self) -> None:
        """Run the step on what its input tensors hold now."""
        ...


class CUDAGraph(Graph):
    """A step captured on a GPU; graphs of one `pool` share the memory of their intermediates."""

    def __init__(self, forward: Forward, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Other threads of the rank may call CUDA meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = forward()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind

    @property
    @override
    def output(self) -> torch.Tensor:
        return self._output

    @override
    def replay(self) -> None:
        self._graph.replay()


class RecordedGraph(Graph):
    """A step as the operators that it dispatched, with their tensors."""

    def __init__(self, forward: Forward) -> None:
        recorder = _Recorder()
        with recorder:
            self._output = forward()
        self._calls = recorder.calls

    @property
    @override
    def output(self) -> torch.Tensor:
        return self._output

    @override
    def replay(self) -> None:
        for operator, args, kwargs, recorded in self._calls:
            results = tree_leaves(operator(*args, **kwargs))
            for old, new in zip(recorded, results, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def replay(graph: Graph) -> torch.Tensor:
    """What a graph returns for what its inputs hold now."""
    graph.replay()
    return graph.output


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        mask = name == "index" and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in WAITING or mask:
            raise CaptureError(f"its forward waits for a value ({name})")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result


def sequence_sizes(most: int) -> list[int]:
    """What the sequences of decoding steps are padded to; the last one is `most`."""
    return _up_to(most, [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most, 32)])


def row_sizes(most: int) -> list[int]:
    """What the rows of steps with prompt chunks are padded to; the last one is `most`."""
    powers = range(5, most.bit_length())
    return _up_to(most, sorted(size << n for n in powers for size in (2, 3)))


def _up_to(most: int, sizes: Sequence[int]) -> list[int]:
    return [*(size for size in sizes if size < most), most]


class GraphCache(Generic[Key]):
    """The graphs of a model runner, by the shape of the step.

    A shape is captured when it is needed for the second time, or while nothing else is to do. All
    graphs together may take `max_bytes` of the device. `agree` has all ranks of a group take the
    same decision.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_bytes: int,
        agree: Callable[[bool], bool] = lambda success: success,
    ) -> None:
        self.bytes = 0
        """What the graphs take."""
        self._device = device
        self._max_bytes = max_bytes
        self._agree = agree
        self._graphs: dict[Key, Graph] = {}
        self._verified: set[Key] = set()
        self._requested: set[Key] = set()
        self._pool = self._new_pool()
        self.stopped = False
        """Whether no further graph is captured: one failed, or the memory is used up."""

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Key) -> Graph | None:
        """The graph of a shape, if there is one."""
        return self._graphs.get(key)

    def is_due(self, key: Key, *, share: float = 1.0) -> bool:
        """Whether a shape whose step is about to run is to be captured first.

        `share`: of the graphs' memory, beyond which shapes like this one are not captured.
        """
        requested = key in self._requested
        self._requested.add(key)
        has_room = self.bytes <= share * self._max_bytes
        return requested and has_room and key not in self._graphs and not self.stopped

    def capture(self, key: Key, forward: Forward) -> None:
        """Run `forward` and capture it. What keeps it from that is logged."""
        graph, failure = None, "it failed on another rank"
        try:
            forward()
            before = self._reserved()
            graph = self._create(forward)
        except Exception as error:  # whatever a model does that a capture does not allow
            failure = first_line(error)
        if self._agree(graph is not None) and graph is not None:
            self._graphs[key] = graph
            self.bytes += self._reserved() - before
            if not self._agree(self.bytes <= self._max_bytes):
                self._stop(f"{len(self)} graphs take {self.bytes >> 20} MiB")
        else:
            self._stop(failure)

    def is_verified(self, key: Key) -> bool:
        """Whether the first replay of a graph was as it should be."""
        return key in self._verified

    def verify(self, key: Key, equal: bool) -> None:
        """Keep a graph whose first replay gave what the step gives without it, on all ranks."""
        if self._agree(equal):
            self._verified.add(key)
        else:
            del self._graphs[key]
            self._stop("a replay gave something else")

    def clear(self) -> None:
        """Forget all graphs: the KV cache that they address is gone."""
        self._graphs.clear()
        self._verified.clear()
        self._requested.clear()
        self._pool = self._new_pool()
        self.bytes = 0

    def _create(self, forward: Forward) -> Graph:
        if self._device.type == "cuda":
            return CUDAGraph(forward, self._pool)
        return RecordedGraph(forward)

    def _new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def _reserved(self) -> int:
        """Bytes of the device that this process has, without what its allocator keeps unused.

        A capture returns that, too, which must not count as what the graph gives back.
        """
        if self._device.type != "cuda":
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def _stop(self, reason: str) -> None:
        self.stopped = True
        logger.warning("no further steps are captured as graphs: %s", reason)
