"""The environment of a rank: what torch, OpenMP, gloo, NCCL and DeepSpeed read from it."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil

from runners.contracts.errors import ConfigError
from runners.protocol.spec import RankSpec

SPIN_COUNT = "20000"
"""How often a waiting thread looks before it sleeps: half a millisecond. GNU OpenMP's own default
is fifteen times that, all of it lost when another process has the core that is waited for."""
GPUS = "CUDA_VISIBLE_DEVICES"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def rank_variables(spec: RankSpec) -> dict[str, str]:
    """What all ranks of a machine have in common; RANK and LOCAL_RANK are each one's own."""
    return {
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        # As DeepSpeed's launcher sets it; without, a CPU counts its NUMA nodes as devices.
        "LOCAL_SIZE": str(spec.local_world_size),
        "OMP_NUM_THREADS": str(spec.num_threads),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT),
        # torch's large tensors in huge pages: weights are read some percent faster.
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        **_interface(spec.rendezvous),
    }


def visible_gpus(share: tuple[int, int, int] | None, there: int) -> dict[str, str]:
    """What lets a model's ranks see its own GPUs alone; nothing if there are more or fewer than all
    models here were given, which then share them as they can."""
    if share is None or there != share[2]:
        return {}
    first, count, _ = share
    names = os.environ.get(GPUS, ",".join(map(str, range(there)))).split(",")
    return {GPUS: ",".join(names[first : first + count])}


def own_address(rendezvous: str) -> str:
    """This machine's address on the way to `host:port`. Raises: ConfigError if there is no way."""
    family, address = resolve(rendezvous)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"rdzv_endpoint {rendezvous} can not be reached: {error}") from None


def resolve(endpoint: str) -> tuple[socket.AddressFamily, Any]:
    """Family and address of `host:port`. Raises: ConfigError."""
    host, port = split_endpoint(endpoint)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"rdzv_endpoint {endpoint} is unknown: {error}") from None
    return family, address


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host comes in brackets."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _interface(rendezvous: str | None) -> dict[str, str]:
    """Has gloo and NCCL listen on the loopback alone, or on the interface that leads to the other
    nodes; what is set already stays.

    Left to themselves they take whatever the machine's own name stands for. Empty if there is no
    way to the other nodes, which the ranks will find out.
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
