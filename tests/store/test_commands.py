"""The commands that fill the model store, as processes: what they import, and interruptions."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers as tf

from tests.support.model_store import copy
from tests.support.processes import wait_until
from tests.support.server import ROOT, environment

LARGE = 1 << 32
"""Bytes: enough to interrupt an import on a busy machine; never written in full."""


def command(module: str, *argv: str | Path) -> list[str]:
    return [sys.executable, "-m", f"model_store_scripts.{module}", *map(str, argv)]


def interrupt(argv: list[str], home: Path, writes: str, number: int) -> tuple[int, str]:
    """Start an import, send a signal once it writes a file; returns exit code and stderr."""
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment(home), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: any((home / "tmp").glob(writes)), 60, "something was written")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, err


def test_the_demo_text_model(tmp_path: Path) -> None:
    script = (
        "import sys; from model_store_scripts.make_demo_models import main; "
        "code = main(['--text']); print('torch' in sys.modules); sys.exit(code)"
    )
    for text, torch in (("imported", "True"), ("already in the store, unchanged", "False")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        summary, _, imported_torch = done.stdout.splitlines()
        assert summary.startswith("demo-text:")
        assert text in summary
        assert imported_torch == torch
    folder = tmp_path / "models" / summary.split()[0].replace(":", "/") / "model"
    assert tf.AutoTokenizer.from_pretrained(folder).chat_template
    assert tf.AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


def test_the_next_import_deletes_what_a_killed_one_left(text_model: Path, tmp_path: Path) -> None:
    big = copy(text_model, tmp_path / "big")
    tensor = {"x": {"dtype": "U8", "shape": [LARGE], "data_offsets": [0, LARGE]}}
    header = json.dumps(tensor).encode()
    with (big / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + LARGE)
    home = tmp_path / "home"
    argv = command("import_model", big, "--name", "big")
    for number, code, leaves in ((signal.SIGTERM, 130, False), (signal.SIGKILL, -9, True)):
        returncode, err = interrupt(argv, home, "*/item/model/model.safetensors", number)
        assert returncode == code, err
        assert any((home / "tmp").iterdir()) is leaves
        assert not any((home / "models").iterdir())
    done = subprocess.run(
        command("import_model", text_model, "--name", "tiny"),
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert not any((home / "tmp").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_of_an_archive_leaves_nothing(number: int, tmp_path: Path) -> None:
    archive = tmp_path / "big.mar"
    with zipfile.ZipFile(archive, "w") as packed:
        info = zipfile.ZipInfo("model.safetensors")
        info.file_size = info.compress_size = LARGE
        info.CRC = info.header_offset = 0
        assert packed.fp is not None
        packed.fp.write(info.FileHeader(zip64=True))
        packed.start_dir = packed.fp.seek(LARGE, os.SEEK_CUR)
        packed.filelist.append(info)
        packed._didModify = True  # type: ignore[attr-defined]
    home = tmp_path / "home"
    argv = command("import_archive", archive)
    returncode, err = interrupt(argv, home, "triptych-import-*/archive/model.safetensors", number)
    assert (returncode, err) == (130, "interrupted: nothing was imported\n")
    assert not any((home / "tmp").iterdir())


def test_checkpoints_json_is_written_into_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.bin").write_bytes(b"")
    argv = command("create_checkpoints_json", "m")
    subprocess.run(argv, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"] == ["a.bin"]
