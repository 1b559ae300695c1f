"""What a model asks of the machines it is deployed on follows from its RunnerConfig."""

from __future__ import annotations

from typing import Any

import pytest

from runners.config import validate

SPLIT = {"engine": "deepspeed", "tensor_parallel": 4}
NODES = {"nnodes": 2, "rdzv_endpoint": "a:1"}
PERSISTENT = {"mode": "persistent", "replica_num": 3}


@pytest.mark.parametrize(
    ("fields", "gpus"),
    [
        ({}, 1),
        ({"gpus": 0}, 0),
        ({"gpus": 5}, 5),
        ({"device_map": "cpu"}, 0),
        ({"device_map": "disk"}, 0),
        ({"device_map": "cuda:2"}, 3),
        ({"device_map": {"a": 0, "b": 1, "c": "cpu"}}, 2),
        ({"device_map": "balanced", "max_memory": {"0": "1GiB", "1": "1GiB", "cpu": "1GiB"}}, 2),
        ({"max_memory": {"cpu": "1GiB"}}, 0),
        (SPLIT, 4),
        (SPLIT | NODES, 2),
        (SPLIT | {"gpus": 0}, 0),
        ({"engine": "mii", "tensor_parallel": 2}, 2),
        ({"engine": "mii", "tensor_parallel": 2, "mii": PERSISTENT}, 6),
        ({"engine": "mii", "mii": {"mode": "persistent", "host": "a", "port_number": 1}}, 0),
        ({"engine": "mii", "task": "fill-mask"}, 1),
        ({"engine": "mii", "task": "text-to-image"}, 1),
        (SPLIT | {"task": "text-to-image"}, 4),
    ],
)
def test_gpus(fields: dict[str, Any], gpus: int) -> None:
    assert validate(fields_of(fields)).gpus_asked == gpus


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ({"max_batch_size": 7}, 7),
        (SPLIT | {"max_batch_size": 7}, 7),
        ({"engine": "mii", "max_batch_size": 7, "mii": PERSISTENT}, 21),
        ({"task": "text-to-image", "max_batch_images": 3}, 3),
        (SPLIT | {"task": "text-to-image", "max_batch_images": 3}, 12),
    ],
)
def test_places(fields: dict[str, Any], places: int) -> None:
    assert validate(fields_of(fields)).places == places


def fields_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {"engine": "accelerate", "name": "x", "model_path": "."} | fields
