"""Staging folders: one import never deletes another's, and deletes what killed ones left."""

from __future__ import annotations

from pathlib import Path

from model_store_scripts.store import staging


def test_a_folder_in_use_is_kept(store: Path) -> None:
    with staging() as first:
        (first / "weights").write_text("")
        with staging() as second:
            assert (first / "weights").exists()
        assert not second.exists()
        assert (first / "weights").exists()
    assert not first.exists()


def test_a_folder_that_no_process_locks_is_deleted(store: Path) -> None:
    leftover = store.parent / "tmp" / "triptych-import-killed"
    (leftover / "item").mkdir(parents=True)
    other = store.parent / "tmp" / "of-bentoml"
    other.mkdir()
    with staging():
        assert not leftover.exists()
        assert other.exists()
