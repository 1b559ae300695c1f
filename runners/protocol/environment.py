"""The environment variables of a rank, which torch, OpenMP, gloo, NCCL and DeepSpeed read."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil

from runners.config.base import BaseRunnerConfig, GpuShare
from runners.contracts.errors import ConfigError

SPIN_COUNT = "20000"
"""Iterations that a waiting thread spins before it sleeps: half a millisecond. GNU OpenMP's default
is fifteen times as long, all of it lost when another process has the core."""
GPUS = "CUDA_VISIBLE_DEVICES"
SHARED_GPUS = "TRIPTYCH_SHARED_GPUS"
"""Set in ranks whose GPUs other models use, too."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_variables(config: BaseRunnerConfig, num_threads: int) -> dict[str, str]:
    """The variables that all ranks of a machine share; RANK and LOCAL_RANK differ."""
    return {
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_WORLD_SIZE": str(config.local_world_size),
        # As DeepSpeed's launcher sets it; without it, DeepSpeed counts NUMA nodes as devices.
        "LOCAL_SIZE": str(config.local_world_size),
        "OMP_NUM_THREADS": str(num_threads),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT),
        # Puts torch's large tensors into huge pages: weights are read some percent faster.
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        **_interface(config.rendezvous),
    }


def visible_gpus(share: GpuShare | None, available: int) -> dict[str, str]:
    """The variable that limits a model's ranks to their share of the GPUs.

    If the machine has another number of GPUs than all models together expect, they share what there
    is, and `SHARED_GPUS` is set instead.
    """
    if share is None:
        return {}
    if available != share.total:
        return {SHARED_GPUS: "1"}
    names = os.environ.get(GPUS, ",".join(map(str, range(available)))).split(",")
    return {GPUS: ",".join(names[share.first : share.first + share.size])}


def own_address(rendezvous: str) -> str:
    """This machine's address on the route to `host:port`. Raises: ConfigError without a route."""
    family, address = resolve(rendezvous)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"{rendezvous} cannot be reached: {error}", field="rdzv_endpoint"
        ) from None


def resolve(endpoint: str) -> tuple[socket.AddressFamily, Any]:
    """Family and address of `host:port`. Raises: ConfigError."""
    host, port = split_endpoint(endpoint)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{endpoint} is unknown: {error}", field="rdzv_endpoint") from None
    return family, address


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host is in brackets."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _interface(rendezvous: str | None) -> dict[str, str]:
    """Variables that make gloo and NCCL listen on the loopback interface only, or on the one that
    leads to the other nodes; a variable that is set already stays.

    By default both use the interface that the machine's host name resolves to. Empty if there is no
    route to the other nodes: the ranks will report that.
    """
    try:
        address = "127.0.0.1" if rendezvous is None else own_address(rendezvous)
    except ConfigError:
        return {}
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(a.address == address for a in addresses)
    ]
    return {v: os.environ.get(v, names[0]) for v in INTERFACES} if names else {}
