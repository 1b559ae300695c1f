"""`make gpu-check --cpu`: every part runs, here with tiny sizes, and a part ends alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
from typing_extensions import override

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import peers, report
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.part import run_part
from benchmarks.gpu_check.recorder import failures, passed
from runners.text.gpu import invariance, kernels
from tests.support.gpu_parts import peer
from tests.support.processes import alive, wait_until

PART = gpu_check.Part("a part", "tests.support.gpu_parts")
LIMIT_S = 1234.0


@pytest.mark.timeout(600)
def test_every_part_runs_on_a_cpu(
    forked_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mii")
    monkeypatch.setenv("MII_CACHE_PATH", str(tmp_path / "mii"))
    # Only the process of the kernels is to run Triton's interpreter, which is slow.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    results = report.RESULTS.read_text()
    with warnings.catch_warnings(action="ignore"):  # of libraries
        status = gpu_check.main(["--cpu", "--output", str(tmp_path)])
    parts = json.loads((tmp_path / "gpu-cpu-dry-run.json").read_text())["parts"]
    assert {key: failures(part) for key, part in parts.items()} == {key: [] for key in "abcdefg"}
    assert {part["state"] for part in parts.values()} == {"complete"}
    assert status == 0
    checks = [check["name"] for part in parts.values() for check in part["checks"]]
    for words in ("float64", "tokens of generate", "same bits as alone", "the image of diffusers"):
        assert any(words in name for name in checks), words
    figures = parts["c"]["figures"]
    assert "1 sequence, share of the bandwidth" in figures
    assert "1 sequences, times transformers' continuous batching" in figures
    setting = "batch_invariant true, operators of torch"
    assert setting in parts["b"]["headlines"]
    assert parts["c"]["headlines"][0].endswith(setting)
    assert figures["triptych, batch_invariant false setting"].startswith("batch_invariant false")
    assert figures["batch_invariant true, times false"]["2"] > 0
    assert "ready from a warm page cache" in parts["g"]["figures"]
    assert report.RESULTS.read_text() == results


class ImpatientPopen(subprocess.Popen[bytes]):
    """A process whose time is up once it has started a child."""

    @override
    def wait(self, timeout: float | None = None) -> int:
        if timeout == LIMIT_S:
            arguments: Any = self.args
            result = Path(arguments[4])
            wait_until(lambda: "child" in report.load(result).get("figures", {}), 60, "a child")
            raise subprocess.TimeoutExpired(self.args, timeout)
        return super().wait(timeout)


def test_a_part_that_takes_too_long_keeps_what_it_had_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_PART", "hangs")
    monkeypatch.setattr(subprocess, "Popen", ImpatientPopen)
    result = gpu_check.run(PART, tmp_path, dry=False, limit_s=LIMIT_S)
    assert (result["state"], result["reason"]) == ("failed", "it took longer than 1234 s")
    assert result["figures"]["measured"] == 1.0
    assert not passed(result)
    if psutil.pid_exists(pid := result["figures"]["child"]):
        child = [psutil.Process(pid)]
        wait_until(lambda: not alive(child), 5, "the end of what the part started")


def test_a_part_that_is_killed_keeps_what_it_had_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_PART", "is killed")
    result = gpu_check.run(PART, tmp_path, dry=False, limit_s=LIMIT_S)
    assert result["state"] == "failed"
    assert LIMIT_S - 60 < result["figures"]["left_s"] <= LIMIT_S
    assert f"status {-signal.SIGKILL}" in result["reason"]
    assert result["figures"]["measured"] == 1.0


def test_a_peer_has_a_process_without_what_triptych_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(invariance._libraries, "cuda", object())
    device = Device(dry=False)
    with pytest.raises(RuntimeError, match="operators of torch for cuda"):
        device.require_stock()
    results = peer(device, "raises", repeat=2)
    seen = [next(results), next(results)]
    assert [replaced for _, replaced in seen] == [False, False]
    assert seen[0][0] == seen[1][0] != os.getpid()
    with pytest.raises(RuntimeError, match=r"^ValueError: a cause"):
        next(results)
    assert not psutil.pid_exists(seen[0][0])
    monkeypatch.undo()
    monkeypatch.setattr(peers, "get_context", lambda _: get_context("fork"))  # starts sooner
    with pytest.raises(RuntimeError, match=f"of peer ended with status {-signal.SIGKILL}"):
        list(peer(device, "is killed", repeat=0))


def test_a_part_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, Any]:
        run_part(PART.module, tmp_path / "result.json", Device(dry=True), tmp_path)
        return report.load(tmp_path / "result.json")

    monkeypatch.setenv("GPU_PART", "raises")
    result = run()
    assert (result["state"], result["reason"]) == ("failed", "ValueError: a cause")
    assert not passed(result)
    monkeypatch.setenv("GPU_PART", "ends")
    assert passed(run())
