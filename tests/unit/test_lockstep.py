"""Batches as integers, as they go between ranks."""

from __future__ import annotations

import pytest

from runners.text.lockstep import HEADER, decode, encode
from runners.text.paging.batch import Batch

SHORT = Batch([[7], [8, 9]], [200, 0], [[1, 2, 3], [4]])
LONG = Batch([[5], list(range(3 * HEADER))], [31, 64], [[0], list(range(96))])


@pytest.mark.parametrize("batch", [SHORT, LONG, Batch([], [], [])])
def test_a_batch_is_made_integers_of_and_back(batch: Batch) -> None:
    assert decode([*encode(batch), 0, 0]) == batch
