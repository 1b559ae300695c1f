"""Archives that are odd, damaged or hostile: each is refused in a sentence or does no harm."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.archives import accelerate_archive, deepspeed_archive, zip_of
from tests.support.importing import cli, refusal, stored_model
from tests.support.model_store import copy, edit_json, store_at

NO_ARCHIVE = ("--archive-format", "no-archive")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    with store_at(tmp_path / "home") as models:
        yield models
        assert not any((models.parent / "tmp").iterdir()), "unpacked files are deleted"


def altered(archive: Path, target: Path, **files: str | bytes | None) -> Path:
    """A copy of a no-archive folder with other files; None removes one."""
    copy(archive, target)
    for name, content in files.items():
        path = target / name.replace("__", "/").replace("_dot_", ".")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return target


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return accelerate_archive(tmp_path_factory.mktemp("folder") / "bloom", llama, *NO_ARCHIVE)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"MAR-INF__MANIFEST_dot_json": None}, "has no MAR-INF/MANIFEST.json"),
        ({"MAR-INF__MANIFEST_dot_json": "{"}, "cannot be read as JSON"),
        ({"MAR-INF__MANIFEST_dot_json": "{}"}, "model: value: Input should be an object"),
        (
            {"MAR-INF__MANIFEST_dot_json": '{"model": {"modelName": "a/b", "handler": "x"}}'},
            "modelName: String should match pattern",
        ),
        ({"model_dot_zip": b"PK\x03\x04" + bytes(99)}, "bloom's model.zip is truncated or damaged"),
        ({"model_dot_zip": None}, "is not a model folder"),
        ({"setup_config_dot_json": '{"trust_remote_code": true}'}, "asks for trust_remote_code"),
        ({"setup_config_dot_json": '{"max_length": 0}'}, "max_length: Input should be greater"),
    ],
)
def test_invalid_archives(
    files: dict[str, Any],
    message: str,
    folder: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = altered(folder, tmp_path / "bloom", **files)
    assert message in refusal(capsys, store, archive)
    packed = shutil.make_archive(str(tmp_path / "bloom"), "gztar", archive)
    assert message.replace("bloom's", "bloom.tar.gz's") in refusal(capsys, store, packed)


def test_a_hostile_model_zip(
    folder: Path, llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = altered(folder, tmp_path / "bloom")
    with zipfile.ZipFile(archive / "model.zip", "a") as packed:
        packed.writestr("../../up.json", "{}")
    message = "bloom's model.zip: '../../up.json' is not a file name a model can have"
    assert message in refusal(capsys, store, archive)
    zip_of(copy(llama, tmp_path / "coded"), archive / "model.zip")
    with zipfile.ZipFile(archive / "model.zip", "a") as packed:
        packed.writestr("modeling_evil.py", "")
    assert "modeling_evil.py is code" in refusal(capsys, store, archive)
    (archive / "model").mkdir()
    assert "has model.zip and model: remove one of them" in refusal(capsys, store, archive)
    assert not list(tmp_path.rglob("up.json"))


def test_a_file_with_an_unsafe_name(
    folder: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = altered(folder, tmp_path / "bloom")
    (archive / "\x1b[2J.py").write_text("")
    assert r"'\x1b[2J.py' is not a file name a model can have" in refusal(capsys, store, archive)


@pytest.mark.parametrize("name", ["model.zip", "MAR-INF/MANIFEST.json", "custom_handler.py"])
def test_links_that_lead_out_of_a_folder(
    name: str, folder: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = altered(folder, tmp_path / "bloom")
    (archive / name).rename(tmp_path / "elsewhere")
    (archive / name).symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out of the model folder" in refusal(capsys, store, archive)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"x = 1\n# \x1b[2J\xc2\x9b\n", ". Its source:\n    | x = 1\n    | # \ufffd[2J\ufffd\n"),
        (b"x = 1\n" * 200, ". Its source:\n" + "    | x = 1\n" * 200),
        (b"x = 1\n" * 207, "    | x = 1\n    ... and 7 more lines\n"),
        (b"#" * 65535 + "\u00e9\n".encode() * 9, "##\n    ... and more\n"),
        (b"", " (it is empty)\n"),
        (b"\xff", " (it is not text)\n"),
    ],
    ids=["escapes", "whole", "lines", "bytes", "empty", "binary"],
)
def test_what_is_shown_of_a_handler(
    content: bytes,
    shown: str,
    folder: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli(altered(folder, tmp_path / "a", custom_handler_dot_py=content)) == 0
    message = capsys.readouterr().out
    assert "its handler, custom_handler.py, was not run; Triptych replaces it" in message
    assert f"{shown}bloom:" in message


@pytest.mark.parametrize("name", ["custom_handler.py", "model.zip"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_should_be_a_file(
    make: Callable[[Path], None],
    name: str,
    folder: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = altered(folder, tmp_path / "bloom")
    (archive / name).unlink()
    make(archive / name)
    assert f"{name} is not a regular file" in refusal(capsys, store, archive)


def with_manifest(archive: Path, **model: object) -> Path:
    """Changes the manifest's section `model`."""
    path = archive / "MAR-INF/MANIFEST.json"
    edit_json(path, model=json.loads(path.read_text())["model"] | model)
    return archive


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("text_classifier", "its handler, text_classifier, is part of TorchServe;"),
        ("gone.py", "its handler, gone.py, is not in it; Triptych replaces it"),
        ("gone.py:handle", "its handler, gone.py, is not in it; Triptych replaces it"),
        ("my handler.py", "its handler, my handler.py, was not run;"),
    ],
)
def test_the_handlers_name(
    handler: str,
    message: str,
    folder: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = with_manifest(altered(folder, tmp_path / "bloom"), handler=handler)
    (archive / "my handler.py").write_text("x = 1\n")
    assert cli(archive) == 0
    assert message in capsys.readouterr().out


def test_no_content_can_forge_a_line(
    folder: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = altered(
        folder, tmp_path / "bloom", model_config_dot_yaml='"x\\e[2J\\nnote: fake": 1\n'
    )
    (archive / "model_config.yaml").rename(archive / "model-config.yaml")
    assert cli(archive) == 0
    captured = capsys.readouterr()
    assert "unknown key x\ufffd[2J\ufffdnote: fake is ignored" in captured.err
    assert "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize("architectures", [["Llama\x1b[2J\nFAKE"], {"a": 1}, "Llama", [7]])
def test_an_architecture_is_a_class(
    architectures: Any,
    folder: Path,
    llama: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_json(copy(llama, tmp_path / "m") / "config.json", architectures=architectures)
    archive = altered(folder, tmp_path / "bloom")
    zip_of(tmp_path / "m", archive / "model.zip")
    message = "config.json has architectures that are not a list of class names"
    assert message in refusal(capsys, store, archive)


@pytest.mark.parametrize("top", ["model", "bloom-7b1", "model/models--bloom/snapshots/5546055f"])
def test_a_model_below_the_top_of_its_zip(
    top: str, folder: Path, llama: Path, store: Path, tmp_path: Path
) -> None:
    """Together with the files that macOS adds."""
    archive = altered(folder, tmp_path / "bloom", _dot_DS_Store=b"\0")
    with zipfile.ZipFile(archive / "model.zip", "w") as packed:
        for file in llama.iterdir():
            packed.write(file, f"{top}/{file.name}")
            packed.writestr(f"__MACOSX/{top}/._{file.name}", b"\0\5\x16\7")
            packed.writestr(f"{top}/._{file.name}", b"\0\5\x16\7")
    assert cli(archive) == 0
    assert stored_model("bloom")[1] == {file.name for file in llama.iterdir()}


def test_two_models_in_one_zip(
    folder: Path, llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = altered(folder, tmp_path / "bloom")
    for name in ("one", "two"):
        copy(llama, tmp_path / "both" / name)
    zip_of(tmp_path / "both", archive / "model.zip")
    message = refusal(capsys, store, archive)
    assert "model.zip contains several models, such as one and two: zip one of them" in message


def test_a_tar_from_macos(folder: Path, store: Path, tmp_path: Path) -> None:
    altered(folder, tmp_path / "in" / "bloom")
    (tmp_path / "in" / "._bloom").write_bytes(b"\0")
    archive = shutil.make_archive(str(tmp_path / "x"), "gztar", tmp_path / "in")
    assert cli(archive) == 0
    assert stored_model("bloom")[0]["max_length"] == 50


def test_the_current_folder(
    folder: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(altered(folder, tmp_path / "bloom", setup_config_dot_json="{"))
    assert "error: bloom/setup_config.json cannot be read" in refusal(capsys, store, ".")


def test_an_archive_without_configuration(
    folder: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = altered(folder, tmp_path / "bloom", setup_config_dot_json=None)
    (archive / "model-config.yaml").unlink()
    assert cli(archive) == 0
    message = "note: bloom has neither setup_config.json nor model-config.yaml: the defaults apply"
    assert message in capsys.readouterr().err


def test_a_note_names_an_unpacked_file_by_the_archive(
    llama: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the archive was unpacked means nothing to the user."""
    assert cli(deepspeed_archive(tmp_path / "opt", llama)) == 0
    note = "opt.tar.gz/checkpoints is not a model folder, opt.tar.gz is one"
    assert f"note: model_path is ignored: {note}\n" in capsys.readouterr().err
