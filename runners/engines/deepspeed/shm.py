"""DeepSpeed's all-reduce for CPUs, which goes through shared memory and not through sockets.

DeepSpeed alone would build it in a folder where a killed build leaves a lock, for which every later
start waits for ever; would take the number of ranks from a variable that only its launcher sets (as
`protocol/environment.py` does here); and would leave its buffers behind in `/dev/shm`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from runners.contracts.errors import ConfigError, first_line
from runners.protocol.cache import CacheUnavailable, building, cache_folder

OPERATOR = "deepspeed_shm_comm"
"""DeepSpeed's name for it."""
_SHM = Path("/dev/shm")  # noqa: S108 - where shm_open puts the buffers; their names have the user
_BUFFER_PREFIX = "deepspeed_allreduce_buffer"


@contextmanager
def shared_memory() -> Iterator[None]:
    """Build and connect the all-reduce, during DeepSpeed's first `init_distributed`.

    Raises: ConfigError if it cannot be compiled here.
    """
    _build()
    deepspeed.ops.__compatible_ops__[OPERATOR] = True
    # DeepSpeed names its buffers after these; without, two rank groups would share them.
    variables = {"MASTER_ADDR": f"triptych.{os.getppid()}", "MASTER_PORT": "ranks"}
    _remove_leftovers()
    os.environ.update(variables)
    try:
        yield
        dist.barrier()
    finally:
        for name in variables:
            del os.environ[name]
        # By now every rank has mapped the buffer, or none ever will.
        _buffer(variables, dist.get_rank()).unlink(missing_ok=True)


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum a tensor over the ranks, in place."""
    if tensor.dtype == torch.float32:
        torch.ops.deepspeed.inference_all_reduce_(tensor)
    else:  # for half precision it needs a newer CPU, and it ignores all other types
        dist.all_reduce(tensor)


def _build() -> None:
    """Compile the operator, which takes minutes, unless it is compiled. Raises: ConfigError."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = f"torch{torch.__version__}-deepspeed{version('deepspeed')}-python{python}"
    try:
        folder = cache_folder(versions)
    except CacheUnavailable as error:
        raise ConfigError(f"needs a cache folder: {error}", field="shm_collectives") from None
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    builder: Any = ShareMemCommBuilder()
    with building(folder):
        try:
            module = builder.load(verbose=False)
        except Exception as error:
            raise ConfigError(
                f"cannot be compiled here: {first_line(error)}; needs Linux and a C++ compiler "
                "such as g++",
                field="shm_collectives",
            ) from error
    if module.vector_kernel_level() < 1:
        raise ConfigError("needs a CPU with AVX2", field="shm_collectives")


def _buffer(variables: dict[str, str], rank: int) -> Path:
    return _SHM / f"{_BUFFER_PREFIX}_{os.getuid()}_{'_'.join(variables.values())}_{rank}"


def _remove_leftovers() -> None:
    """Remove the buffers of rank groups that were killed."""
    for path in _SHM.glob(f"{_BUFFER_PREFIX}_{os.getuid()}_triptych.*"):
        launcher = path.name.split("triptych.")[1].split("_")[0]
        if not Path("/proc", launcher).exists():
            path.unlink(missing_ok=True)
