"""Memory: what the machine and its control groups allow, and what is configured beyond it."""

from __future__ import annotations

import logging
from array import array
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM

from runners.config.model import DeepSpeedTextConfig
from runners.contracts.errors import ConfigError
from runners.rank.memory import Memory, machine_memory
from runners.text.execution import HostExecution
from runners.text.memory import kv_tokens
from runners.text.model_runner import HFModelRunner
from runners.text.paging.batch import Batch
from runners.text.parity import check_and_pack
from tests.support.models import write_model

TOTAL = psutil.virtual_memory().total
NONE_V1 = 2**63 - 4096
"""What version 1 says of a group without a limit."""


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def v2(folder: Path, limit: int | str, used: int = 0, reclaimable: int = 0) -> None:
    stat = f"anon 5\ninactive_file {reclaimable}\nactive_file 7"
    group(folder, max=limit, current=used, stat=stat)


def v1(folder: Path, limit: int, used: int = 0, reclaimable: int = 0, outer: int = NONE_V1) -> None:
    stat = f"inactive_file 3\nhierarchical_memory_limit {outer}\ntotal_inactive_file {reclaimable}"
    group(folder, limit_in_bytes=limit, usage_in_bytes=used, stat=stat)


def measured(mount: Path, own: str) -> Memory:
    file = mount.with_name("own")
    file.write_text(own)
    return machine_memory(mount, file)


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_a_container_sees_its_own_group_as_the_root(mount: Path) -> None:
    v2(mount, limit=10**8, used=7 * 10**7, reclaimable=10**7)
    assert measured(mount, "0::/\n") == (10**8, 4 * 10**7)
    # The path of version 1 is that of the machine, which a container does not see.
    v1(mount / "memory", limit=10**7, used=6 * 10**6, reclaimable=10**6)
    assert measured(mount, "4:memory:/docker/abc\n0::/\n") == (10**7, 5 * 10**6)


@pytest.mark.parametrize("own", ["0::/a/b\n", "0::/../a/b\n", "1:name=systemd:/x\n0::/a/b\n"])
def test_groups_are_nested(mount: Path, own: str) -> None:
    v2(mount / "a", limit=10**8, used=9 * 10**7)
    v2(mount / "a" / "b", limit=5 * 10**7, used=10**6)
    v2(mount / "c", limit=1)
    assert measured(mount, own) == (5 * 10**7, 10**7)


def test_groups_of_version_1_are_nested(mount: Path) -> None:
    v1(mount / "memory", limit=NONE_V1, used=10**9)
    v1(mount / "memory" / "a", limit=10**8, used=9 * 10**7)
    v1(mount / "memory" / "a" / "b", limit=NONE_V1, used=10**6, outer=10**8)
    assert measured(mount, "5:cpu,memory:/a/b\n4:cpu:/c\n") == (10**8, 10**7)


def test_an_outer_limit_is_known_where_its_group_cannot_be_seen(mount: Path) -> None:
    v1(mount / "memory", limit=NONE_V1, used=4 * 10**7, outer=10**8)
    assert measured(mount, "5:memory:/kubepods/pod/x\n") == (10**8, 6 * 10**7)


@pytest.mark.parametrize("own", ["", "0::/\n", "0::/a\n5:memory:/\n"])
def test_without_a_limit_there_is_the_machine(mount: Path, own: str) -> None:
    v2(mount / "a", limit="max", used=10**6)
    v1(mount / "memory", limit=NONE_V1, used=10**6)
    total, free = measured(mount, own)
    assert total == TOTAL
    assert 0 < free <= total


def test_where_there_are_no_groups_there_is_the_machine(tmp_path: Path) -> None:
    assert machine_memory(tmp_path, tmp_path / "none").total == TOTAL


class Rank:
    """The start of a rank on a machine whose memory is a number of its model's KV tokens."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = write_model("llama", folder)
        self._model = AutoModelForCausalLM.from_pretrained(self._folder)
        self._layout = check_and_pack(self._model, None)
        runner = HFModelRunner(self._model, self._layout, blocks=1)
        runner.run(Batch([[0]], [0], [array("i", [0])], [True]))
        [self._token_bytes] = runner.bytes_per_token().values()
        self._patch = monkeypatch

    def kv_tokens(self, *, total: int, free: int, **fields: Any) -> int:
        memory = Memory(total * self._token_bytes, free * self._token_bytes)
        self._patch.setattr("runners.text.memory.machine_memory", lambda: memory)
        config = DeepSpeedTextConfig(name="m", model_path=self._folder, **fields)
        return kv_tokens(
            self._model, self._layout, config, max_context=64, execution=HostExecution()
        )


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(tmp_path / "llama", monkeypatch)


def test_kv_takes_its_share_of_the_free_memory(rank: Rank) -> None:
    assert rank.kv_tokens(total=9000, free=1000) == 600
    assert rank.kv_tokens(total=9000, free=1000, tensor_parallel=2) == 300, "both ranks have it"
    assert rank.kv_tokens(total=9000, free=9000) == 32 * 64, "all that a full batch can use"
    with pytest.raises(ConfigError, match="no memory is left"):
        rank.kv_tokens(total=9000, free=50)


def test_more_kv_than_the_machine_holds_is_refused(rank: Rank) -> None:
    assert rank.kv_tokens(total=9000, free=9000, max_kv_tokens=9000) == 9000
    for fields in ({"max_kv_tokens": 9001}, {"max_kv_tokens": 4501, "tensor_parallel": 2}):
        with pytest.raises(ConfigError, match=r"GiB of memory on cpu, which has .* GiB") as caught:
            rank.kv_tokens(total=9000, free=9000, **fields)
        assert caught.value.field == "max_kv_tokens"
        assert str(fields["max_kv_tokens"]) in caught.value.reason


def test_more_kv_than_is_free_is_warned_of(rank: Rank, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "triptych.rank"):
        assert rank.kv_tokens(total=9000, free=5000, max_kv_tokens=5000) == 5000
        assert not caplog.messages
        assert rank.kv_tokens(total=9000, free=5000, max_kv_tokens=5001) == 5001
    [message] = caplog.messages
    assert message.startswith("max_kv_tokens: 5001 need")
    assert message.endswith("are free")


def test_a_batch_whose_logits_the_machine_cannot_hold_is_refused(rank: Rank) -> None:
    with pytest.raises(ConfigError) as caught:
        rank.kv_tokens(total=300, free=300, max_batch_size=4096)
    assert caught.value.field == "max_batch_size"
