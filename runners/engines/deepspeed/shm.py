"""DeepSpeed's own all-reduce for CPUs, through shared memory in place of sockets.

Left alone it is built in a folder where a build that was killed leaves a lock on which every later
start waits for ever, reads its number of ranks from a variable only DeepSpeed's launcher sets
(`ranks/environment.py` does too), and leaves its buffers behind in `/dev/shm`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runners.contracts.errors import ConfigError, first_line
from runners.protocol.cache import CacheUnavailable, building, cache_folder

NAME = "deepspeed_shm_comm"
SHARED = Path("/dev/shm")  # noqa: S108 - where shm_open puts them, of a user each
BUFFERS = "deepspeed_allreduce_buffer"
"""How the names of its buffers begin."""


@contextmanager
def shared_memory() -> Iterator[None]:
    """For DeepSpeed's first `init_distributed`: builds and connects the all-reduce.

    Raises: ConfigError if it can not be built here.
    """
    import deepspeed

    _build()
    deepspeed.ops.__compatible_ops__[NAME] = True
    # It names its buffers after these, and would find those of another group of ranks.
    unique = {"MASTER_ADDR": f"triptych.{os.getppid()}", "MASTER_PORT": "ranks"}
    _remove_leftovers()
    os.environ.update(unique)
    try:
        yield
        dist.barrier()
    finally:
        for name in unique:
            del os.environ[name]
        # Mapped by all ranks by now, or by none ever.
        _buffer(unique, dist.get_rank()).unlink(missing_ok=True)


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum a tensor over the ranks, in place."""
    if tensor.dtype == torch.float32:
        torch.ops.deepspeed.inference_all_reduce_(tensor)
    else:  # half precision asks for more of the CPU; of other types it would do nothing
        dist.all_reduce(tensor)


def _build() -> None:
    """Compile the operator unless it is compiled; takes minutes. Raises: ConfigError."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = f"torch{torch.__version__}-deepspeed{version('deepspeed')}-python{python}"
    try:
        folder = cache_folder(versions)
    except CacheUnavailable as error:
        raise ConfigError(f"shm_collectives needs a cache folder: {error}") from None
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    builder: Any = ShareMemCommBuilder()
    with building(folder):
        try:
            module = builder.load(verbose=False)
        except Exception as error:
            raise ConfigError(
                f"shm_collectives cannot be compiled here: {first_line(error)}; it needs Linux and "
                "a C++ compiler such as g++"
            ) from error
    if module.vector_kernel_level() < 1:
        raise ConfigError("shm_collectives needs a CPU with AVX2")


def _buffer(unique: dict[str, str], rank: int) -> Path:
    return SHARED / f"{BUFFERS}_{os.getuid()}_{'_'.join(unique.values())}_{rank}"


def _remove_leftovers() -> None:
    """Buffers of ranks that were killed before they could."""
    for path in SHARED.glob(f"{BUFFERS}_{os.getuid()}_triptych.*"):
        launcher = path.name.split("triptych.")[1].split("_")[0]
        if not Path("/proc", launcher).exists():
            path.unlink(missing_ok=True)
