"""What a model asks of the machines it is deployed on follows from its RunnerConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_choice import chosen_runners
from runners.config.base import GpuShare
from runners.config.model import validate
from runners.contracts.errors import ConfigError
from runners.protocol.environment import visible_gpus
from settings import Settings

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
    assert validate(fields_of(fields)).requested_gpus == gpus


@pytest.mark.parametrize(
    ("fields", "max_concurrency"),
    [
        ({"max_batch_size": 7}, 7),
        (SPLIT | {"max_batch_size": 7}, 7),
        ({"engine": "mii", "max_batch_size": 7, "mii": PERSISTENT}, 21),
        ({"task": "text-to-image", "max_batch_images": 3}, 3),
        (SPLIT | {"task": "text-to-image", "max_batch_images": 3}, 12),
    ],
)
def test_max_concurrency(fields: dict[str, Any], max_concurrency: int) -> None:
    assert validate(fields_of(fields)).max_concurrency == max_concurrency


@pytest.mark.parametrize(
    ("set_here", "there", "text", "image"),
    [
        (None, 3, "0,1", "2"),
        ("5,GPU-a,7", 3, "5,GPU-a", "7"),
        (None, 2, None, None),  # fewer: they share what there is
        (None, 8, None, None),  # more: nobody dealt them out
        (None, 0, None, None),
    ],
)
def test_models_keep_to_their_own_gpus_where_there_are_just_enough(
    monkeypatch: pytest.MonkeyPatch,
    set_here: str | None,
    there: int,
    text: str | None,
    image: str | None,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if set_here:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", set_here)
    for share, visible in ((GpuShare(0, 2, 3), text), (GpuShare(2, 1, 3), image)):
        assert visible_gpus(share, there).get("CUDA_VISIBLE_DEVICES") == visible
    assert visible_gpus(None, there) == {}


def test_two_models_get_shares(tmp_path: Path) -> None:
    (split := tmp_path / "split").mkdir()
    (split / "config.json").write_text("{}")
    (split / "setup_config.json").write_text(json.dumps(SPLIT))
    (painter := tmp_path / "painter").mkdir()
    (painter / "model_index.json").write_text("{}")
    both = chosen_runners(str(split), str(painter), Settings())
    specs = [runner._group._spec for runner in (both.text, both.image)]  # type: ignore[union-attr]
    shares = [spec.load_config().gpu_share for spec in specs]
    assert shares == [(0, 4, 5), (4, 1, 5)]
    alone = chosen_runners(str(split), "", Settings())
    assert alone.text._group._spec.load_config().gpu_share is None  # type: ignore[union-attr]


def test_a_model_over_several_machines_is_served_where_they_meet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "setup_config.json").write_text(json.dumps(SPLIT | {"nnodes": 2}))
    with pytest.raises(ConfigError, match="rdzv_endpoint: is needed"):
        chosen_runners(str(tmp_path), "", Settings())
    assert chosen_runners(str(tmp_path), "", Settings(rdzv_endpoint="a:1")).text is not None


def test_pictures_are_painted_on_one_machine() -> None:
    with pytest.raises(ConfigError, match="nnodes: belongs to a text model on DeepSpeed"):
        validate(fields_of(SPLIT | NODES | {"task": "text-to-image"}))


def fields_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {"engine": "accelerate", "name": "x", "model_path": "."} | fields
