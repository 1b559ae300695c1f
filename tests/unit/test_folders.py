"""The private folder of a process: which ones it removes, and what a full disk is called."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runners.contracts.errors import ConfigError
from runners.protocol import folders
from runners.protocol.folders import check_room, process_folder, remove_process_folder


@pytest.fixture(autouse=True)
def no_folder_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_folders", [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def dead_pid() -> Iterator[int]:
    """Of a process that has ended and whose parent has not asked how: a zombie."""
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        yield ended.pid


def test_it_is_private_and_there_is_one(tmp_path: Path) -> None:
    folder = process_folder()
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert process_folder() == folder
    remove_process_folder()
    assert not folder.exists()
    assert process_folder() != folder


def test_one_that_was_cleaned_away_is_made_again() -> None:
    folder = process_folder()
    folder.rmdir()
    assert process_folder().is_dir()


def test_folders_of_killed_processes_are_removed(tmp_path: Path, dead_pid: int) -> None:
    stale = tmp_path / f"triptych-{dead_pid}-a"
    (stale / "logs").mkdir(parents=True)
    kept = [
        tmp_path / f"triptych-{os.getppid()}-a",  # of a process that lives
        tmp_path / f"triptych-{dead_pid}-locked",  # of one that lives in another container
        tmp_path / "triptych-demo-a",
        tmp_path / "triptych-²-a",
        tmp_path / "other",
    ]
    for folder in kept:
        folder.mkdir()
    (tmp_path / f"triptych-{dead_pid}-link").symlink_to(tmp_path / "other")
    descriptor = os.open(kept[1], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    process_folder()
    os.close(descriptor)
    assert not stale.exists()
    assert all(folder.is_dir() for folder in kept)


def test_another_users_folder_is_left_alone(
    tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / f"triptych-{dead_pid}-a"
    foreign.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: foreign.stat().st_uid + 1)
    process_folder()
    assert foreign.is_dir()


SCRIPT = """
import os
from runners.protocol.folders import process_folder
print(process_folder(), flush=True)
if os.fork() == 0:
    raise SystemExit
os.wait()
assert process_folder().is_dir()
os.kill(os.getpid(), {signal})
"""


@pytest.mark.parametrize(("signal", "remains"), [(0, False), (9, True)])
def test_it_is_removed_at_exit(tmp_path: Path, signal: int, remains: bool) -> None:
    """And by the next process if this one is killed; a forked process removes nothing."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(signal=signal)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    folder = Path(done.stdout.splitlines()[0])
    assert folder.exists() is remains, done.stderr
    process_folder()
    assert not folder.exists()


def test_no_room_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_room()

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"temporary folder .* No space left .*TMPDIR"):
        check_room()
