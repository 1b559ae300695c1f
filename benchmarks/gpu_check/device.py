"""The device of a check: its name, its clock and what it can do at most.

On a CPU (`--cpu`, a dry run) the same code runs with tiny sizes, to see that it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

DRY_RUN = "cpu-dry-run"
COPY_BYTES = 2**30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Device:
    """Where a part runs; `dry` runs have tiny sizes and no meaning but that they end."""

    dry: bool

    @property
    def target(self) -> torch.device:
        """The device of all tensors."""
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def name(self) -> str:
        """The name of the card."""
        return DRY_RUN if self.dry else torch.cuda.get_device_name()

    def pick(self, real: Any, dry: Any) -> Any:
        """A size for the GPU or, in a dry run, a smaller one."""
        return dry if self.dry else real

    def synchronize(self) -> None:
        """Wait until all that was launched has run."""
        if not self.dry:
            torch.cuda.synchronize()

    def require_stock(self) -> None:
        """Raises: RuntimeError if something of Triptych's serves all models of this process.

        What Triptych is compared with has to be computed where nothing is.
        """
        from runners.text.gpu.fusing import fused_functions
        from runners.text.gpu.invariance import installed

        replaced = [f"functions of {name}" for name in fused_functions()]
        if installed(self.target.type):
            replaced.append(f"operators of torch for {self.target.type}")
        if replaced:
            raise RuntimeError(f"a reference would run on Triptych's {', '.join(replaced)}")

    def release(self) -> None:
        """Return freed memory to the device."""
        import gc

        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object], *, repeat: int = 20) -> float:
        """The median time of one call on the device, without that of its launch by Python.

        On a GPU, each call is between two events, after the second-level cache was overwritten: a
        model's weights are not in it either.
        """
        if self.dry:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        for _ in range(3):
            run()
        flush = torch.empty(2**28, dtype=torch.uint8, device=self.target)
        create: Any = torch.cuda.Event
        pairs = []
        for _ in range(repeat):
            flush.zero_()
            pair = [create(enable_timing=True) for _ in range(2)]
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        self.synchronize()
        return float(median(start.elapsed_time(end) for start, end in pairs)) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy from memory to memory."""
        source = torch.empty(self.pick(COPY_BYTES, 2**20), dtype=torch.uint8, device=self.target)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def matmul_rate(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """Floating-point operations per second of a large square matrix product of torch's.

        Raises: RuntimeError as `require_stock`.
        """
        self.require_stock()
        size: int = self.pick(MATMUL_SIZE, 64)
        left, right = (torch.randn(size, size, device=self.target).to(dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: left @ right)

    def versions(self) -> dict[str, str]:
        """The software that speed and results depend on."""
        import platform
        from importlib.metadata import PackageNotFoundError, version

        versions = {"python": platform.python_version(), "torch": torch.__version__}
        for package in ("triton", "transformers", "diffusers", "deepspeed", "deepspeed-mii"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        if not self.dry:
            versions["cuda"] = str(torch.version.cuda)
        return versions
