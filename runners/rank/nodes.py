"""What ranks on several machines exchange through the store: their set-up, and heartbeats.

Rank 0 passes the other machines' heartbeats on to its host, which watches all ranks alike. The
other ranks end when node 0 stays silent.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
from torch._C._distributed_c10d import Store, TCPStore

from runners.contracts.errors import ConfigError
from runners.protocol.messages import Heartbeat
from runners.rank.program import HEARTBEAT_S, RankContext

SETUP = "triptych/setup"
NODE_FIELDS = {
    *("name", "model_path", "revision", "node_rank", "rdzv_endpoint", "num_threads"),
    *("cpu_kernels", "start_timeout", "heartbeat_timeout", "step_timeout", "gpus", "gpu_share"),
}
"""Fields that may differ between the machines."""
SAMPLES, SAMPLE_BYTES = 64, 4096


def verify_same_setup(store: Store, context: RankContext) -> None:
    """Raises: ConfigError if this rank does not have the same model and config as rank 0."""
    folder = context.config.model_path
    setup = context.config.model_dump(mode="json", exclude=NODE_FIELDS)
    setup["config.json"] = (folder / "config.json").read_text(encoding="utf-8")
    setup["weights"] = _weights_digest(folder)
    setup["presence of GPUs"] = torch.cuda.is_available()
    if context.rank == 0:
        store.set(SETUP, msgspec.json.encode(setup).decode())
        return
    expected = msgspec.json.decode(store.get(SETUP))
    keys = sorted(k for k in {*setup, *expected} if setup.get(k) != expected.get(k))
    if keys:
        raise ConfigError(f"node 0 serves another set-up: {', '.join(keys)} differ")


def _weights_digest(folder: Path) -> str:
    """A digest of samples of the weight files, which tells versions of a model apart."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(size * i // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def start_heartbeats(store: TCPStore, context: RankContext) -> None:
    """Start to exchange heartbeats with the ranks of other machines."""
    if context.rank == 0:
        threading.Thread(target=_relay, args=(store, context), daemon=True).start()
    elif context.rank >= _local_world_size():
        threading.Thread(target=_report, args=(store, context), daemon=True).start()


def _relay(store: Store, context: RankContext) -> None:
    last_beats: dict[int, bytes] = {}
    while True:
        for rank in range(_local_world_size(), context.config.world_size):
            if store.check([_beat(rank)]) and (beat := store.get(_beat(rank))) != last_beats.get(
                rank
            ):
                last_beats[rank] = beat
                context.emit(Heartbeat(rank, 0.0))
        time.sleep(HEARTBEAT_S)


def _report(store: TCPStore, context: RankContext) -> None:
    timeout = timedelta(seconds=context.config.heartbeat_timeout)
    try:
        # A separate connection: the group's blocks while it waits.
        store = TCPStore(store.host, store.port, timeout=timeout, wait_for_workers=False)
        for count in itertools.count():
            store.set(_beat(context.rank), str(count))
            store.wait([SETUP], timeout)  # whose answer shows that the way back is open
            time.sleep(HEARTBEAT_S)
    except RuntimeError as error:
        print(f"ConnectionError: node 0 is lost: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _local_world_size() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"])


def _beat(rank: int) -> str:
    return f"triptych/beat/{rank}"
