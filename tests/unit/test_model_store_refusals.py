"""What an import refuses: code, pickles, links out and missing files, each named in the error."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf

from model_store_scripts.importing import ImportRequest, import_model
from model_store_scripts.safety import refuse_unsafe_names
from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel
from tests.support.model_store import (
    copy,
    edit_json,
    pickled,
    write_pipeline,
)

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sharded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(llama, tmp_path_factory.mktemp("models") / "sharded")
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    return folder


def assert_refused(
    folder: Path, store: Path, change: Change, cls: type[ConfigError], message: str
) -> None:
    import_model(ImportRequest(str(folder), "sound"))
    change(folder)
    before = sorted(store.rglob("*"))
    with pytest.raises(ConfigError) as error:
        import_model(ImportRequest(str(folder), "changed"))
    assert type(error.value) is cls
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(store.rglob("*")) == before


def write(name: str, content: str | bytes = "") -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def edit(name: str, **values: object) -> Change:
    return lambda folder: edit_json(folder / name, **values)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def link(name: str, target: str) -> Change:
    return lambda folder: (folder / name).symlink_to(target)


def resize(name: str, by: int) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:by] if by < 0 else content + b"\0" * by)

    return change


def header(content: bytes, *, length: int | None = None) -> Change:
    """A safetensors file with this header, which may declare another length than it has."""
    declared = struct.pack("<Q", len(content) if length is None else length)
    return write("model.safetensors", declared + content)


CODE = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
ALIEN = json.dumps({"x": {"dtype": "F32"}}).encode()
NOT_COMPLETE = (
    "model.safetensors is not a complete safetensors file: Error while deserializing header:"
)
DEEP = '{"a": ' + "[" * 100_000


def tensor(*shape: object) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (write("modeling_evil.py"), "modeling_evil.py is code"),
        (write("deep/er/setup.PY"), "deep/er/setup.PY is code"),
        (write("kernel.so"), "kernel.so is code"),
        (edit("config.json", **CODE), "config.json has auto_map"),
        (edit("config.json", text_config=CODE), "config.json has auto_map"),
        (edit("config.json", parts=[CODE]), "config.json has auto_map"),
        (edit("config.json", custom_pipelines={"x": {"impl": "y"}}), "has custom_pipelines"),
        (edit("tokenizer_config.json", **CODE), "tokenizer_config.json has auto_map"),
        (edit("generation_config.json", **CODE), "generation_config.json has auto_map"),
        (edit("config.json", trust_remote_code=True), "config.json asks for trust_remote_code"),
        (edit("setup_config.json", trust_remote_code=True), "setup_config.json asks for trust"),
        (link("tokenizer.model", "/etc/hostname"), "tokenizer.model is a link that leads out"),
        (link("notes.txt", "../beside.txt"), "notes.txt is a link that leads out"),
        (link("folder", "/etc"), "folder is a link that leads out"),
        (link("again", "."), "again is a link to a folder"),
        (lambda f: os.mkfifo(f / "pipe.json"), "pipe.json is not a regular file"),
        (write("a\nb.json"), r"'a\nb.json' is not a file name"),
        (write("\x1b[2J.json"), r"'\x1b[2J.json' is not a file name"),
        (write("a\\b.json"), "is not a file name"),
        (write("x" * 201), "is not a file name"),
        (write(os.fsdecode(b"\xff.json")), "is not a file name"),
    ],
)
def test_unsafe(change: Change, message: str, llama: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "beside.txt").write_text("private")
    assert_refused(copy(llama, tmp_path / "model"), store, change, UnsafeModel, message)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.json", "a/../../up.json"])
def test_unsafe_names_in_a_listing(name: str) -> None:
    with pytest.raises(UnsafeModel, match="is not a file name"):
        refuse_unsafe_names([name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("config.json"), "neither config.json (text) nor model_index.json (image)"),
        (remove("model.safetensors"), "model.safetensors is missing"),
        (both(remove("model.safetensors"), write("training_args.bin")), "model.safetensors is m"),
        (remove("tokenizer.json"), "tokenizer.json is missing: the model has no tokenizer"),
        (both(remove("tokenizer.json"), write("vocab.json", "{}")), "has no tokenizer"),
        (resize("model.safetensors", -1), f"{NOT_COMPLETE} incomplete metadata, file not fully"),
        (resize("model.safetensors", 1), f"{NOT_COMPLETE} incomplete metadata, file not fully"),
        (header(b"{}", length=99), f"{NOT_COMPLETE} invalid header length"),
        (write("model.safetensors"), f"{NOT_COMPLETE} header too small"),
        (write("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
        (write("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
        (header(b"no json"), f"{NOT_COMPLETE} invalid JSON in header"),
        (header(ALIEN), f"{NOT_COMPLETE} invalid JSON in header: missing field"),
        (header(DEEP.encode()), f"{NOT_COMPLETE} invalid JSON in header: recursion limit"),
        (header(tensor(10**12, "abc")), f"{NOT_COMPLETE} invalid JSON in header: invalid type"),
        (header(tensor(*[10**18] * 300)), f"{NOT_COMPLETE} overflow computing buffer size"),
        (header(tensor(2**63, 2)), f"{NOT_COMPLETE} overflow computing buffer size"),
        (header(b"{}", length=2**40), f"{NOT_COMPLETE} header too large"),
        (link("merges.txt", "gone.txt"), "merges.txt is a link that leads nowhere"),
        (link("merges.txt", "merges.txt"), "merges.txt is a link that leads nowhere"),
    ],
)
def test_incomplete(change: Change, message: str, llama: Path, store: Path, tmp_path: Path) -> None:
    assert_refused(copy(llama, tmp_path / "model"), store, change, IncompleteModel, message)


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "cls", "message"),
    [
        (remove(SHARD), IncompleteModel, f"{SHARD} is missing, which {INDEX} lists"),
        (resize(SHARD, -3), IncompleteModel, f"{SHARD} is not a complete safetensors file"),
        (edit(INDEX, weight_map=[]), IncompleteModel, f"{INDEX} has no weight_map"),
        (edit(INDEX, weight_map={"a": 1}), IncompleteModel, f"{INDEX} has no weight_map"),
        (edit(INDEX, weight_map={"a": SHARD}), IncompleteModel, f"{SHARD} lacks a, which"),
        (edit(INDEX, weight_map={"a": "../a.safetensors"}), IncompleteModel, "a.safetensors is"),
        (
            both(edit(INDEX, weight_map={"a": "a.bin"}), write("a.bin")),
            UnsafeModel,
            f"{INDEX} lists a.bin, which is not a .safetensors file",
        ),
    ],
)
def test_shards(
    change: Change,
    cls: type[ConfigError],
    message: str,
    sharded: Path,
    store: Path,
    tmp_path: Path,
) -> None:
    assert_refused(copy(sharded, tmp_path / "model"), store, change, cls, message)


@pytest.mark.parametrize(
    ("change", "cls", "message"),
    [
        (remove("vae/config.json"), IncompleteModel, "vae/config.json is missing"),
        (
            remove("unet/diffusion_pytorch_model.safetensors"),
            IncompleteModel,
            "unet/diffusion_pytorch_model.safetensors is missing",
        ),
        (
            remove("text_encoder/model.safetensors"),
            IncompleteModel,
            "text_encoder/model.safetensors is missing",
        ),
        (
            resize("vae/diffusion_pytorch_model.safetensors", -2),
            IncompleteModel,
            "vae/diffusion_pytorch_model.safetensors is not a complete safetensors file",
        ),
        (remove("tokenizer/merges.txt"), IncompleteModel, "tokenizer/tokenizer.json is missing"),
        (
            remove("scheduler/scheduler_config.json"),
            IncompleteModel,
            "scheduler/scheduler_config.json is missing",
        ),
        (
            remove("feature_extractor/preprocessor_config.json"),
            IncompleteModel,
            "feature_extractor/preprocessor_config.json is missing",
        ),
        (edit("vae/config.json", **CODE), UnsafeModel, "vae/config.json has auto_map"),
        (edit("model_index.json", _class_name=["pipe", "Pipe"]), UnsafeModel, "custom pipeline"),
        (edit("model_index.json", _class_name="os.system"), UnsafeModel, "custom pipeline"),
        (edit("model_index.json", unet=["os", "system"]), UnsafeModel, "takes unet from"),
        (edit("model_index.json", unet=["diffusers", "A", "b"]), UnsafeModel, "takes unet from"),
        (edit("model_index.json", unet=["diffusers", "a.b"]), UnsafeModel, "takes unet from"),
        (
            edit("model_index.json", **{"../../x": ["diffusers", "UNet2DModel"]}),
            UnsafeModel,
            "model_index.json has a component called '../../x'",
        ),
        (edit("model_index.json", unet=["diffusers"]), UnsafeModel, "takes unet from"),
    ],
)
def test_pipelines(
    change: Change, cls: type[ConfigError], message: str, store: Path, tmp_path: Path
) -> None:
    assert_refused(write_pipeline(tmp_path / "model"), store, change, cls, message)


def test_pickles_as_the_only_weights(llama: Path, store: Path, tmp_path: Path) -> None:
    message = "pytorch_model.bin is a pickle, which can carry code, and there are no safetensors"
    assert_refused(copy(llama, tmp_path / "model"), store, pickled, UnsafeModel, message)


@pytest.mark.parametrize("name", ["model.pt", "weights.pth", "model.ckpt", "all.pkl", "a.pickle"])
def test_pickles_of_any_name(name: str, llama: Path, store: Path, tmp_path: Path) -> None:
    change = both(remove("model.safetensors"), write(name))
    assert_refused(
        copy(llama, tmp_path / "model"), store, change, UnsafeModel, f"{name} is a pickle"
    )


@pytest.mark.skipif("sentencepiece" in sys.modules, reason="sentencepiece is installed")
def test_a_tokenizer_that_this_build_cannot_read(llama: Path, store: Path, tmp_path: Path) -> None:
    change = both(remove("tokenizer.json"), write("tokenizer.model"))
    message = "tokenizer.json is missing: tokenizer.model alone needs the sentencepiece package"
    assert_refused(copy(llama, tmp_path / "model"), store, change, IncompleteModel, message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "setup_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        (DEEP, "cannot be read as JSON"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "is nested more than 100 levels deep"),
    ],
    ids=["cut", "endless", "deep"],
)
def test_invalid_json(
    content: str, message: str, name: str, llama: Path, store: Path, tmp_path: Path
) -> None:
    folder = copy(llama, tmp_path / "model")
    assert_refused(folder, store, write(name, content), ConfigError, f"{name} {message}")
