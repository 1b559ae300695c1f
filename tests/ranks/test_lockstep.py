"""Batches between ranks: what is sent is what is received, short and long."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from runners.text.lockstep import HEADER, TPGroup, decode, encode
from runners.text.paging.batch import Batch

SHORT = Batch(
    [[-2], [8, 9]], [200, 0], [array("i", [1, 2, 3]), array("i", [4])], [True, False], shared=True
)
LONG = Batch(
    [[5], list(range(3 * HEADER))],
    [31, 64],
    [array("i", [0]), array("i", range(96))],
    [False, True],
)


@pytest.mark.parametrize("batch", [SHORT, LONG, Batch([], [], [], [])])
def test_a_batch_is_made_integers_of_and_back(batch: Batch) -> None:
    assert decode([*encode(batch), 0, 0]) == batch


def _rank(rank: int, folder: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    group = TPGroup()
    got: list[Any] = []
    for batch in (SHORT, LONG, None, SHORT):
        if group.is_leader:
            group.send(batch)
        else:
            got.append(group.receive())
    got.append(group.all_reduce_min(rank + 3))
    if rank == 1:
        try:
            group.all_reduce_min(1, timeout_s=0.2)
        except TimeoutError as error:
            got.append(str(error))
        results.put(got)


def test_ranks_receive_what_was_sent_and_do_not_wait_for_ever(tmp_path: Path) -> None:
    spawn = mp.get_context("spawn")
    results = spawn.SimpleQueue()
    ranks = [spawn.Process(target=_rank, args=(r, str(tmp_path), results)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert results.get() == [SHORT, LONG, None, SHORT, 3, "another rank does not take part"]
