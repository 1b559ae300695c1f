"""Whatever a file, an archive or a frame contains, it is read, or refused by an error of ours.

Hypothesis makes the content: JSON of any shape under the names that a reader knows, and valid files
with damage.
"""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.numpy import save

from api.http.schemas import WireModel
from api.native.images import GenerateImageRequest
from api.native.schemas import GenerateRequest, TokenizeRequest
from api.openai.images import ImageGenerationRequest
from api.openai.requests import ChatRequest, CompletionRequest
from model_store_scripts.archives import open_archive
from model_store_scripts.safety import refuse_unsafe_configs
from runners.config import deepspeed
from runners.config.base import DTYPES
from runners.config.files import load_setup_config
from runners.config.ignored import MII_KEYS, SETUP_CONFIG_KEYS, TORCHSERVE_KEYS
from runners.config.mii import MIISection
from runners.config.mii_files import LEGACY_SECTIONS
from runners.config.model import SETUP_CONFIG, fields_of
from runners.config.torchserve import HANDLER, MODEL_CONFIG, TOP, TORCHRUN
from runners.contracts.errors import ConfigError, IncompleteModel, InvalidRequest
from runners.contracts.tasks import IMAGE_TASK, PIPELINE_TASKS
from runners.hf.weights import read_header
from runners.protocol.channel import encode_frame, read_rank_message
from runners.protocol.messages import Accepted, Events, Heartbeat, Hello, RankMessage

EXAMPLES = 30


def examples(count: int = EXAMPLES) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.integers(-2, 9)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*DTYPES, *PIPELINE_TASKS, IMAGE_TASK, "auto", "mii", "1GiB", "0", "../x"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def objects(
    keys: Iterable[str], sections: Mapping[str, SearchStrategy[Any]] | None = None
) -> SearchStrategy[dict[str, Any]]:
    """Objects with any values under some of `keys`, and mostly with `sections` under theirs."""
    fixed = {name: section | values for name, section in (sections or {}).items()}
    known = st.dictionaries(st.sampled_from(["_", *sorted(keys)]), values, max_size=5)
    some = st.fixed_dictionaries({}, optional=fixed)
    return st.builds(lambda one, two: {**one, **two}, known, some)


engines = st.sampled_from(["accelerate", "deepspeed", "mii"])
ds_config = objects(
    deepspeed.KEYS, {"tensor_parallel": objects(["tp_size", "tp_grain_size"]), "tp": values}
)
generate_section = objects(["do_sample", "temperature", "top_p", "top_k", "stop", "max_new_tokens"])
manager = objects(
    ["max_ragged_sequence_count", "max_ragged_batch_size"],
    {"memory_config": objects(["mode", "size"], {"mode": st.just("allocate")})},
)
mii_section = objects(
    [*MIISection.model_fields, *MII_KEYS, "dtype", "task", "tensor_parallel"],
    {
        "generate": generate_section,
        "model_config": objects(MIISection.model_fields),
        "inference_engine_config": objects(
            ["tp", "manager"],
            {"tensor_parallel": objects(["tp_size"]), "state_manager": manager},
        ),
    },
)
setup_config = objects(
    [*fields_of(), *SETUP_CONFIG_KEYS, "torch_dtype", "model_path", "unknown"],
    {
        "engine": engines,
        "mii": mii_section,
        "deepspeed": ds_config | st.just({"config": deepspeed.DS_CONFIG}),
    },
)
legacy_config = objects(
    [*MII_KEYS, "task_name", "torch_dtype", "max_memory"],
    {
        "model_name": st.text(max_size=4),
        "task": scalars,
        LEGACY_SECTIONS[0]: mii_section,
        "model_config": objects(["guidance_scale", "num_inference_steps"]),
    },
)
model_config = objects(
    [*TOP, *TORCHSERVE_KEYS, "parallelType"],
    {
        "handler": objects([*fields_of(), *HANDLER, "max_length", "tensor_parallel"]),
        "torchrun": objects([*TORCHRUN, "nproc-per-node"]),
        "deepspeed": objects(["config"], {"config": st.just(deepspeed.DS_CONFIG)}),
    },
)
head = objects(
    ["model_type", "is_encoder_decoder", "auto_map"],
    {
        "architectures": st.lists(st.sampled_from(["LlamaForCausalLM", "BertForMaskedLM"])),
        "quantization_config": objects(["quant_method", "bits"]),
    },
)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


@examples(80)
@given(data=st.data())
def test_config_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("model")
    write(folder / "config.json", data.draw(head))
    write(folder / deepspeed.DS_CONFIG, data.draw(ds_config))
    for name, content in {
        SETUP_CONFIG: setup_config | legacy_config,
        MODEL_CONFIG: model_config,
    }.items():
        if data.draw(st.booleans()):
            write(folder / name, data.draw(content))
    with suppress(ConfigError):
        load_setup_config(folder, name="m")


@examples()
@given(name=st.sampled_from([SETUP_CONFIG, MODEL_CONFIG, "config.json"]), content=st.binary())
def test_config_files_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("model")
    write(folder / "config.json", {})
    (folder / name).write_bytes(content)
    with suppress(ConfigError):
        load_setup_config(folder, name="m")


@examples()
@given(content=objects(["auto_map", "_class_name", "unet", "architectures"]) | values)
def test_configs_that_may_point_at_code(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model_index.json"):
        write(folder / name, content)
    with suppress(ConfigError):
        refuse_unsafe_configs(folder, ["config.json", "model_index.json"])


class Tokenizer:
    """The one attribute that is read."""

    eos_token_id = None


@examples()
@given(
    content=objects(
        [
            "do_sample",
            "temperature",
            "top_k",
            "eos_token_id",
            "stop_strings",
            "max_new_tokens",
            "top_p",
        ]
    )
)
def test_generation_configs(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]
) -> None:
    from runners.engines.mii.defaults import load_generation_config
    from runners.hf.models import end_token_ids, sampling_defaults, warn_about_ignored

    folder = tmp_path_factory.mktemp("model")
    write(folder / "generation_config.json", content)
    with suppress(ConfigError):
        generation = load_generation_config(folder)
        warn_about_ignored(generation)
        sampling_defaults(generation)
        end_token_ids(generation, Tokenizer(), 99)


@examples()
@given(content=st.dictionaries(st.integers(-1, 3).map(str), values) | objects(["label_list"]))
def test_labels(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    from runners.config.torchserve import INDEX_TO_NAME
    from runners.engines.tasks import label_names

    folder = tmp_path_factory.mktemp("model")
    write(folder / INDEX_TO_NAME, content)
    with suppress(ConfigError):
        assert all(isinstance(name, str) for name in label_names(folder, 3).values())


def damage(content: bytes) -> SearchStrategy[bytes]:
    """The content with a few bytes changed, and perhaps its end cut off or something put there."""
    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)

    def damaged(places: list[tuple[int, int]], end: int, added: bytes) -> bytes:
        changed = bytearray(content)
        for index, byte in places:
            changed[index] = byte
        return bytes(changed[:end]) + added

    end = st.just(len(content)) | st.integers(0, len(content))
    return st.builds(damaged, places, end, st.just(b"") | st.binary(max_size=20))


def zipped(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def tarred(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=0) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


MANIFEST = {"model": {"modelName": "m", "handler": "h.py", "modelVersion": "1"}}
FILES = {
    "MAR-INF/MANIFEST.json": json.dumps(MANIFEST).encode(),
    "h.py": b"pass",
    "config.json": b"{}",
    "model.zip": zipped({"config.json": b"{}"}),
}


def open_bytes(folder: Path, content: bytes) -> None:
    path = folder / "m.mar"
    path.write_bytes(content)
    with suppress(ConfigError), open_archive(path):
        pass


@pytest.mark.parametrize("packed", [zipped, tarred])
@examples(50)
@given(data=st.data())
def test_archives_with_damage(
    tmp_path_factory: pytest.TempPathFactory,
    packed: Callable[[Mapping[str, bytes]], bytes],
    data: st.DataObject,
) -> None:
    open_bytes(tmp_path_factory.mktemp("archive"), data.draw(damage(packed(FILES))))


names = st.text(max_size=6) | st.sampled_from(
    ["../x", "/x", "a/b", "MAR-INF", "h.py", "", ".", "\0"]
)


@examples()
@given(
    manifest=objects(
        [], {"model": objects(["modelName", "handler", "modelVersion", "configFile"])}
    ),
    members=st.dictionaries(names, st.binary(max_size=8), max_size=3),
    packed=st.sampled_from([zipped, tarred]),
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_archives_of_any_content(
    tmp_path_factory: pytest.TempPathFactory,
    manifest: dict[str, Any],
    members: dict[str, bytes],
    packed: Callable[[Mapping[str, bytes]], bytes],
) -> None:
    try:
        content = packed({**members, "MAR-INF/MANIFEST.json": json.dumps(manifest).encode()})
    except (ValueError, UnicodeError):
        return  # no such archive can be made
    open_bytes(tmp_path_factory.mktemp("archive"), content)


TENSORS = save({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int8)})


@examples(80)
@given(content=damage(TENSORS))
def test_headers_of_safetensors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    path.write_bytes(content)
    with suppress(IncompleteModel):
        read_header(path)


MESSAGES: list[RankMessage] = [
    Hello(0, 1),
    Heartbeat(0, 0.5, 1, 2, 3, 4),
    Accepted("r", 3),
    Events([]),
]


@examples(60)
@given(content=st.sampled_from(MESSAGES).map(encode_frame).flatmap(damage))
def test_frames(content: bytes) -> None:
    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(content)
        reader.feed_eof()
        while await read_rank_message(reader) is not None:
            pass

    with suppress(ValueError):
        asyncio.run(read())


BODIES = [
    ChatRequest,
    CompletionRequest,
    GenerateImageRequest,
    GenerateRequest,
    ImageGenerationRequest,
    TokenizeRequest,
]


@pytest.mark.parametrize("body", BODIES)
@examples()
@given(data=st.data())
def test_bodies(body: type[WireModel], data: st.DataObject) -> None:
    known = objects([*body.model_fields, "unknown"], {"prompt": st.text(max_size=3)})
    content = data.draw(known.map(json.dumps).map(str.encode) | st.binary(max_size=20))
    with suppress(InvalidRequest):
        body.parse(content)
