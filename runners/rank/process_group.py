"""The ranks' process groups: gloo on CPUs, NCCL on GPUs, and a second gloo group for control.

The ranks of one machine meet in a file of their private folder, those of several machines at node
0's TCP store, which listens on the interface of `rdzv_endpoint` only.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from runners.config.base import BaseRunnerConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.protocol.environment import resolve, split_endpoint
from runners.rank.nodes import start_heartbeats, verify_same_setup
from runners.rank.program import RankContext


@dataclass(frozen=True)
class RankGroups:
    """The groups of a connected rank; both have the same ranks."""

    control: dist.ProcessGroup
    """For CPU tensors."""
    device: torch.device
    """The device of this rank's part of the model."""


def connect(config: BaseRunnerConfig, store: Store | None = None) -> RankGroups:
    """Join the other ranks at `store`, or without it where MASTER_ADDR and MASTER_PORT point.

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
    """Time after which a collective fails if a rank does not take part."""
    return timedelta(seconds=max(config.start_timeout, config.step_timeout))


def _check_gpus() -> None:
    """Raises: ConfigError if there are GPUs, but not one for each rank."""
    available, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < available < ranks:
        raise ConfigError(
            f"{ranks} ranks on this machine need as many GPUs, it has {available}; set "
            "tensor_parallel, or CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def meet(context: RankContext) -> Store:
    """The store where the ranks meet. Raises: ConfigError if their set-ups differ."""
    world_size, rendezvous = context.config.world_size, context.config.rendezvous
    if rendezvous is None:
        return FileStore(str(context.work_dir / "rendezvous"), world_size)
    host, port = split_endpoint(rendezvous)
    leads = context.rank == 0
    context.progress(RunnerState.STARTING, f"waiting for the other nodes at {rendezvous}")
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=leads,
        timeout=_timeout(context.config),
        wait_for_workers=False,
        master_listen_fd=_listen(rendezvous) if leads else None,
    )
    verify_same_setup(store, context)
    start_heartbeats(store, context)
    return store


def _listen(rendezvous: str) -> int:
    """A socket for the store, which would else listen on all interfaces. Raises: ConfigError."""
    family, address = resolve(rendezvous)
    try:
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"{rendezvous} must be a free port of node 0, this machine: {error}",
            field="rdzv_endpoint",
        ) from None
    return listener.detach()
