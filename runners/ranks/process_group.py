"""The ranks' process group: gloo on CPUs, NCCL on GPUs, and gloo beside it for what ranks tell
each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class RankGroups:
    """The groups of a connected rank, of the same ranks both."""

    control: dist.ProcessGroup
    """Of CPU tensors."""
    device: torch.device
    """Where this rank's share of the model lies."""


def connect(*, timeout: float) -> RankGroups:
    """Join the group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR ...).

    `timeout` is the seconds after which a collective that not all ranks take part in fails.
    """
    local = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=limit)
    control = dist.new_group(backend="gloo", timeout=limit)
    return RankGroups(control, device)
