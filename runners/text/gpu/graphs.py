"""Graphs of decode steps: a step's launches, recorded once and replayed without Python.

`GPUModelRunner` captures one graph per padded batch size. On a GPU a graph is a CUDA graph. On a
CPU, where tests run, it is the list of operators that torch dispatched: like a CUDA graph it reads
the same tensors at each replay, runs none of the model's Python, and refuses what waits for a value.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from runners.contracts.errors import first_line

logger = logging.getLogger("triptych.text")

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
        # Other threads of the rank may call CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = forward()

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


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
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


def padded_sizes(max_batch_size: int) -> list[int]:
    """The batch sizes that decode steps are padded to, up to and including the largest batch."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_batch_size, 32)]
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


class GraphCache:
    """The graphs of a model runner, by padded batch size.

    A size is captured once a step of that size has run eagerly. `agree` has all ranks of a group
    take the same decision. All graphs together may take `max_bytes` of the device.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: Sequence[int],
        *,
        max_bytes: int,
        agree: Callable[[bool], bool] = lambda success: success,
    ) -> None:
        self.sizes = list(sizes)
        self.bytes = 0
        """What the graphs take."""
        self._device = device
        self._max_bytes = max_bytes
        self._agree = agree
        self._graphs: dict[int, Graph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._stopped = False

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def stopped(self) -> bool:
        """Whether no further size is captured: one failed, or the memory is used up."""
        return self._stopped

    def padded(self, count: int) -> int:
        """The smallest size that holds `count` sequences."""
        return self.sizes[bisect.bisect_left(self.sizes, count)]

    def get(self, size: int) -> Graph | None:
        """The graph of a size; None before it is captured."""
        return self._graphs.get(size)

    def missing(self) -> int | None:
        """The smallest size that is not captured yet; None if there is none, or it is too late."""
        if self._stopped:
            return None
        return next((size for size in self.sizes if size not in self._graphs), None)

    def capture(self, size: int, forward: Forward) -> None:
        """Capture `forward`, which has run before, and keep the graph if its replay returns the
        same; otherwise no size is captured from now on."""
        if self._stopped:
            return
        graph, failure = None, ""
        before = self._reserved()
        try:
            expected = forward().clone()
            graph = self._create(forward)
        except Exception as error:  # whatever a model does that a capture does not allow
            failure = first_line(error)
        captured = self._agree(graph is not None)
        if captured and graph is not None:
            graph.replay()
            same = torch.equal(graph.output.nan_to_num(), expected.nan_to_num())
            captured = self._agree(same)
            failure = "" if same else "a replay returns something else"
        if captured and graph is not None:
            self._graphs[size] = graph
            self.bytes += self._reserved() - before
            if not self._agree(self.bytes <= self._max_bytes):
                self._stop(f"{len(self)} graphs take {self.bytes >> 20} MiB")
            return
        self._stop(failure or "it failed on another rank")

    def clear(self) -> None:
        """Forget all graphs: the KV cache that they address is gone."""
        self._graphs.clear()
        self.bytes = 0

    def _create(self, forward: Forward) -> Graph:
        if self._device.type == "cuda":
            return CUDAGraph(forward, self._pool)
        return RecordedGraph(forward)

    def _reserved(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.memory_reserved(self._device)

    def _stop(self, reason: str) -> None:
        self._stopped = True
        logger.warning("no further decode steps are captured as graphs: %s", reason)
