"""Which folders and names can be the source of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_store_scripts import sources
from model_store_scripts.importing import ImportRequest, import_model
from runners.contracts.errors import ConfigError, ModelNotFound, UnsafeModel
from tests.support.model_store import copy, is_empty


def test_a_setup_config_that_links_out(llama: Path, store: Path, tmp_path: Path) -> None:
    copy(llama, tmp_path / "mar" / "model")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "mar" / "setup_config.json").symlink_to("../secret.json")
    with pytest.raises(UnsafeModel, match=r"setup_config\.json is a link that leads out"):
        import_model(ImportRequest(str(tmp_path / "mar"), "refused"))
    assert is_empty(store)


def test_a_model_folder_that_links_out(llama: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "mar").mkdir()
    (tmp_path / "mar" / "model").symlink_to(llama)
    with pytest.raises(UnsafeModel, match="model is a link that leads out"):
        import_model(ImportRequest(str(tmp_path / "mar"), "refused"))
    assert is_empty(store)


def test_a_hub_cache_snapshot_is_a_folder_too(llama: Path, store: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    copy(llama, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert import_model(ImportRequest(str(snapshot), "cached")).new
    (tmp_path / "repo" / "private").write_text("")
    (snapshot / "x.json").symlink_to("../../private")
    with pytest.raises(UnsafeModel, match=r"x\.json is a link that leads out"):
        import_model(ImportRequest(str(snapshot), "cached"))


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c", "~", "-x", "config.json"])
def test_no_such_source(
    source: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(llama)
    message = f"{source} is neither a folder nor the id of a hub model"
    with pytest.raises(ModelNotFound, match=message):
        import_model(ImportRequest(source, "none"))


def test_far_too_many_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILES", len(list(llama.iterdir())) - 1)
    with pytest.raises(ConfigError, match="is not a model folder"):
        import_model(ImportRequest(str(llama), "many"))
