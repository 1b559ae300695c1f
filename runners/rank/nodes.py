"""What ranks on several machines tell each other beside the model's own traffic, through the store:
how they are set up, and that they live.

Rank 0 passes the others' signs of life on to its host, which watches them as it does its own. The
others end when node 0 stays silent.
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
from runners.rank.program import RankContext
from runners.rank.worker import HEARTBEAT_S

SET_UP = "triptych/set-up"
OWN_FIELDS = {
    *("name", "model_path", "revision", "node_rank", "rdzv_endpoint", "num_threads"),
    *("cpu_kernels", "start_timeout", "heartbeat_timeout", "step_timeout", "gpus", "gpu_share"),
}
"""Fields that each machine may set as it likes."""
NATIVE = ("avx512_bf16", "avx512_fp16")
SAMPLES, SAMPLE_BYTES = 64, 4096


def hold_to_the_set_up(store: Store, context: RankContext) -> None:
    """Raises: ConfigError if this rank was not given the same model and config as rank 0."""
    ours = context.config.model_dump(mode="json", exclude=OWN_FIELDS)
    ours["config.json"] = (context.config.model_path / "config.json").read_text(encoding="utf-8")
    ours["weights"] = _weights(context.config.model_path)
    ours["GPUs or none"] = torch.cuda.is_available()
    if not ours["GPUs or none"] and ours["dtype"] == "auto":
        able = torch.cpu.get_capabilities()
        ours["half precision of the CPUs (set dtype)"] = [able.get(name) for name in NATIVE]
    if context.rank == 0:
        store.set(SET_UP, msgspec.json.encode(ours).decode())
        return
    theirs = msgspec.json.decode(store.get(SET_UP))
    if differing := sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)):
        raise ConfigError(f"node 0 serves another set-up: {', '.join(differing)} differ")


def _weights(folder: Path) -> str:
    """A digest of samples of the weight files; as good as all of them, for versions that differ."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(size * i // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def keep_in_touch(store: TCPStore, context: RankContext) -> None:
    """Begin to exchange signs of life with the ranks of other machines."""
    if context.rank == 0:
        threading.Thread(target=_relay, args=(store, context), daemon=True).start()
    elif context.rank >= _local_world_size():
        threading.Thread(target=_report, args=(store, context), daemon=True).start()


def _relay(store: Store, context: RankContext) -> None:
    seen: dict[int, bytes] = {}
    while True:
        for rank in range(_local_world_size(), context.world_size):
            if store.check([_beat(rank)]) and (beat := store.get(_beat(rank))) != seen.get(rank):
                seen[rank] = beat
                context.emit(Heartbeat(rank, 0.0))
        time.sleep(HEARTBEAT_S)


def _report(store: TCPStore, context: RankContext) -> None:
    timeout = timedelta(seconds=context.config.heartbeat_timeout)
    try:
        # A connection of its own: the group's is busy while it waits.
        store = TCPStore(store.host, store.port, timeout=timeout, wait_for_workers=False)
        for count in itertools.count():
            store.set(_beat(context.rank), str(count))
            store.wait([SET_UP], timeout)  # which answers: the way back is open too
            time.sleep(HEARTBEAT_S)
    except RuntimeError as error:
        print(f"ConnectionError: node 0 is lost: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _local_world_size() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"])


def _beat(rank: int) -> str:
    return f"triptych/beat/{rank}"
