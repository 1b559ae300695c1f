"""The ranks' process group: gloo on CPUs, NCCL on GPUs, and gloo beside it for what ranks tell
each other.

The ranks of one machine meet in a file of their private folder, those of several at node 0's TCP
store, which listens on the interface of `rdzv_endpoint` alone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from runners.config.model import BaseRunnerConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.protocol.environment import resolve, split_endpoint
from runners.rank.nodes import hold_to_the_set_up, keep_in_touch
from runners.rank.program import RankContext


@dataclass(frozen=True)
class RankGroups:
    """The groups of a connected rank, of the same ranks both."""

    control: dist.ProcessGroup
    """Of CPU tensors."""
    device: torch.device
    """Where this rank's share of the model lies."""


def connect(config: BaseRunnerConfig, store: Store | None = None) -> RankGroups:
    """Join the other ranks at `store`; without, where the environment says (MASTER_ADDR ...).

    Raises: ConfigError if there are GPUs, but not one for each rank.
    """
    timeout = _timeout(config)
    gpu = torch.cuda.is_available()
    _check_gpus()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )
    return RankGroups(dist.new_group(backend="gloo", timeout=timeout), device)


def _timeout(config: BaseRunnerConfig) -> timedelta:
    """After which a collective fails that not all ranks take part in."""
    return timedelta(seconds=max(config.start_timeout, config.step_timeout))


def _check_gpus() -> None:
    """Raises: ConfigError if there are some, but not one for each rank."""
    there, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < there < wanted:
        raise ConfigError(
            f"{wanted} ranks on this machine need as many GPUs, it has {there}; set "
            "tensor_parallel, or CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def meet(context: RankContext) -> Store:
    """Where the ranks of our own groups meet. Raises: ConfigError if they are not set up alike."""
    if context.rendezvous is None:
        return FileStore(str(context.work_dir / "rendezvous"), context.world_size)
    host, port = split_endpoint(context.rendezvous)
    leads = context.rank == 0
    context.progress(RunnerState.STARTING, f"waiting for the other nodes at {context.rendezvous}")
    store = TCPStore(
        host,
        port,
        context.world_size,
        is_master=leads,
        timeout=_timeout(context.config),
        wait_for_workers=False,
        master_listen_fd=_listen(context.rendezvous) if leads else None,
    )
    hold_to_the_set_up(store, context)
    keep_in_touch(store, context)
    return store


def _listen(rendezvous: str) -> int:
    """A socket for the store, which by itself would listen everywhere. Raises: ConfigError."""
    family, address = resolve(rendezvous)
    try:
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"rdzv_endpoint {rendezvous} must be a free port of node 0, this machine: {error}"
        ) from None
    return listening.detach()
