"""Imports that fail: wrong values, bad usage, and interruptions that leave nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import bentoml
import pytest
import transformers as tf

from model_store_scripts import copying, import_model
from model_store_scripts.importing import ImportRequest
from model_store_scripts.importing import import_model as run_import
from runners.contracts.errors import ConfigError
from tests.support.model_store import is_empty


def cli(*argv: str | Path) -> int:
    return import_model.main([str(a) for a in argv])


def test_wrong_values_and_the_wrong_task_are_refused(
    llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in (
        (("--max-length", "0"), "max_length: Input should be greater than or equal to 1"),
        (("--tensor-parallel", "2"), "tensor_parallel: Input should be 1"),
        (("--task", "text-to-image"), "task: is text-to-image, but "),
        (("--setup-config", tmp_path / "none.json"), "none.json does not exist"),
        (("--revision", "main"), "is a local folder and has no revisions"),
    ):
        assert cli(llama, "--name", "tiny", *wrong) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    assert is_empty(store)


@pytest.mark.parametrize(
    "usage",
    [
        ("--name", "Not A Name"),
        ("--name", "tiny:v1"),
        ("--name", "a" * 64),
        ("--name", "../../etc"),
        ("--name", "tiny", "--max-memory", "10GB"),
        ("--name", "tiny", "--device-map", "{"),
        ("--name", "tiny", "--engine", "vllm"),
        ("--name", "tiny", "--trust-remote-code"),
        ("--nam", "tiny"),
        (),
    ],
)
def test_bad_usage(usage: tuple[str, ...], llama: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli(llama, *usage)
    assert stop.value.code == 2


def test_a_bad_name_is_refused_without_the_command_too(llama: Path) -> None:
    with pytest.raises(ConfigError, match="'Not A Name' is not a model name"):
        run_import(ImportRequest(str(llama), "Not A Name"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_an_interrupted_copy_leaves_nothing(
    error: Any,
    llama: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: int) -> None:
            assert any((store.parent / "tmp").rglob("config.json")), "something was copied"
            raise error

    monkeypatch.setattr(copying, "progress_bar", lambda *_: Bar())
    assert cli(llama, "--name", "tiny") == (130 if error is KeyboardInterrupt else 1)
    assert capsys.readouterr().err.count("\n") == 1
    assert is_empty(store)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "bad disk")])
def test_the_store_has_all_or_nothing(
    error: Any,
    llama: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr("shutil.copytree", fail)
    assert cli(llama, "--name", "tiny") == (130 if error is KeyboardInterrupt else 1)
    message = (
        "interrupted" if error is KeyboardInterrupt else "error: the model store refuses tiny:"
    )
    assert capsys.readouterr().err.startswith(message)
    assert is_empty(store)


def test_a_store_on_another_disk(llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", other_disk)
    imported = run_import(ImportRequest(str(llama), "tiny"))
    tf.AutoConfig.from_pretrained(Path(bentoml.models.get(imported.tag).path, "model"))
    assert not any((store.parent / "tmp").iterdir())


def test_a_full_disk_is_noticed_before_copying(
    llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match="has only 1,000"):
        run_import(ImportRequest(str(llama), "tiny"))
    assert is_empty(store)
