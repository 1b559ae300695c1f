"""Which files of a model folder make up the model, and whether all of them are there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from runners.config.files import task_of
from runners.config.model import SETUP_CONFIG
from runners.config.reading import read_json
from runners.config.support import refuse_without_tokenizer
from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel
from runners.hf.weights import Header, read_header

AUXILIARY = (
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
NOT_AUXILIARY = (
    SETUP_CONFIG,
    "*.index.json",
    "*.index.*.json",
    "adapter_config.json",
    "trainer_state.json",
)
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
TRAINING_STATE = (
    "training_args*",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "trainer_*",
)
"""Files that a training run leaves next to its weights."""

_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.[a-z]+")


@dataclass(frozen=True)
class Part:
    """One folder of a model: a whole text model, or one component of a pipeline."""

    folder: str
    config: tuple[str, ...] = ()
    weights: str = ""
    """The name of a weight file without `.safetensors`; empty for a part without weights."""
    tokenizer: bool = False

    def path(self, name: str) -> str:
        """The name in the whole model of a file of this part."""
        return f"{self.folder}/{name}" if self.folder else name

    def files(self, names: Collection[str]) -> list[str]:
        """The files directly in this part's folder, by their names in it."""
        prefix = f"{self.folder}/" if self.folder else ""
        return sorted(
            n.removeprefix(prefix)
            for n in names
            if n.startswith(prefix) and n.count("/") == prefix.count("/")
        )


@dataclass(frozen=True)
class Pickles:
    """Pickled weights of a part, to be converted; file names as in the whole model."""

    part: Part
    files: tuple[str, ...]


@dataclass
class WeightFiles:
    """The weights of a model: safetensors (with their indexes), and pickles to convert."""

    files: list[str] = field(default_factory=list)
    pickles: list[Pickles] = field(default_factory=list)


def parts_of(root: Path) -> list[Part]:
    """The parts that the folder's head file names. Raises: ConfigError (unreadable head)."""
    if task_of(root) != "text-to-image":
        return [Part("", config=("config.json",), weights="model", tokenizer=True)]
    parts = [Part("", config=("model_index.json",))]
    for name, value in read_json(root / "model_index.json", "model_index.json").items():
        if isinstance(value, list) and value != [None, None]:
            parts.append(_component(name, *map(str, value)))
    return parts


def _component(name: str, library: str, class_name: str) -> Part:
    if PurePosixPath(name).name != name:
        raise UnsafeModel(f"model_index.json has a component called {name!r}")
    if "Scheduler" in class_name:
        return Part(name, config=("scheduler_config.json",))
    if "Tokenizer" in class_name:
        return Part(name, tokenizer=True)
    if class_name.endswith(("Processor", "FeatureExtractor")):
        return Part(name, config=("preprocessor_config.json", "processor_config.json"))
    weights = "diffusion_pytorch_model" if library == "diffusers" else "model"
    return Part(name, config=("config.json",), weights=weights)


def auxiliary_files(parts: list[Part], names: Collection[str]) -> list[str]:
    """Configurations, tokenizers, templates and licences, which are copied as they are."""
    files = []
    for part in parts:
        files += [
            part.path(name)
            for name in part.files(names)
            if _matches(name, AUXILIARY) and not _matches(name, NOT_AUXILIARY)
        ]
        templates = part.path("additional_chat_templates/")
        files += [n for n in names if n.startswith(templates) and n.endswith(".jinja")]
    return sorted(files)


def indexes(parts: list[Part], names: Collection[str]) -> list[str]:
    """The shard indexes, which list the weight files."""
    return [p.path(n) for p in parts for n in p.files(names) if _is_index(n)]


def refuse_incomplete(parts: list[Part], names: Collection[str]) -> None:
    """Refuse a part without its configuration or, where it needs one, without a tokenizer.

    Raises: IncompleteModel that names the missing file.
    """
    for part in parts:
        if part.config and not any(part.path(c) in names for c in part.config):
            raise IncompleteModel(f"{part.path(part.config[0])} is missing")
        if part.tokenizer:
            refuse_without_tokenizer(names, prefix=part.path(""))


def choose_weights(
    root: Path, parts: list[Part], names: Collection[str], *, convert: bool
) -> WeightFiles:
    """The weight files of every part: safetensors if there are any, else pickles.

    Raises: IncompleteModel that names a missing file; UnsafeModel for pickled weights unless
    `convert`; ConfigError if it is unclear which pickles are the weights.
    """
    weights = WeightFiles()
    variant = _variant(parts, names)
    for part in parts:
        if not part.weights:
            continue
        stem = part.path(part.weights)
        candidates = [(f"{stem}.safetensors", f"{stem}.safetensors.index.json")]
        if variant:
            single = f"{stem}.{variant}.safetensors"
            candidates.append((single, f"{stem}.safetensors.index.{variant}.json"))
        for single, index in candidates:
            if single in names:
                weights.files.append(single)
                break
            if index in names:
                weights.files += [index, *_shards(root, index, names, {".safetensors"})]
                break
        else:
            weights.pickles.append(_pickles(root, part, names, convert=convert))
    return weights


def _variant(parts: list[Part], names: Collection[str]) -> str | None:
    """The variant that is served of a pipeline, such as `fp16`; None if each part has plain files.

    As diffusers' `save_pretrained(variant=...)` names them. It is that of the first part that has
    no others, like in the ranks.
    """
    for part in parts:
        stem, files = part.weights, part.files(names)
        plain = {f"{stem}.safetensors", f"{stem}.safetensors.index.json"}
        if not stem or not part.folder or plain & set(files):
            continue
        pattern = rf"{re.escape(stem)}\.(?:safetensors\.index\.)?(\w+)\.(?:safetensors|json)"
        if variants := {m[1] for m in (re.fullmatch(pattern, file) for file in files) if m}:
            return min(variants)
    return None


def _is_index(name: str) -> bool:
    return fnmatch(name, "*.index.json") or fnmatch(name, "*.index.*.json")


def read_headers(files: Mapping[str, Path]) -> dict[str, Header]:
    """The headers of the safetensors among `files`, compared with the indexes among them.

    Raises: IncompleteModel that names the file that is truncated, damaged or lacks a tensor.
    """
    headers = {n: read_header(p, n) for n, p in files.items() if n.endswith(".safetensors")}
    for index in filter(_is_index, files):
        for tensor, shard in _weight_map(files[index], index).items():
            name = _sibling(index, shard)
            if tensor not in headers[name].tensors:
                raise IncompleteModel(f"{name} lacks {tensor}, which {index} lists")
    return headers


def refuse_pointers(root: Path, files: list[str]) -> None:
    """Refuse a Git LFS pointer in place of a file. Raises: IncompleteModel."""
    for name in files:
        path = root / name
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise IncompleteModel(
                f"{name} is a Git LFS pointer: fetch the file with `git lfs pull`"
            )


def _pickles(root: Path, part: Part, names: Collection[str], *, convert: bool) -> Pickles:
    stem = "pytorch_model" if part.weights == "model" else part.weights
    index = part.path(f"{stem}.bin.index.json")
    candidates = [
        part.path(name)
        for name in part.files(names)
        if PurePosixPath(name).suffix in PICKLES and not _matches(name, TRAINING_STATE)
    ]
    if not candidates:
        raise IncompleteModel(f"{part.path(part.weights)}.safetensors is missing")
    if not convert:
        raise UnsafeModel(
            f"{candidates[0]} is a pickle, which can carry code, and there are no safetensors: "
            "--convert-checkpoints converts it without running any"
        )
    if index in names:
        return Pickles(part, tuple(_shards(root, index, names, PICKLES)))
    if part.path(f"{stem}.bin") in candidates:
        return Pickles(part, (part.path(f"{stem}.bin"),))
    if len(candidates) == 1 or _is_complete_set(candidates):
        return Pickles(part, tuple(candidates))
    raise ConfigError(f"which of {', '.join(candidates)} are the weights? There is no {stem}.bin")


def _is_complete_set(files: list[str]) -> bool:
    """Whether sorted names are those of all shards of one checkpoint."""
    numbers = [m.groups() for m in map(_SHARD.fullmatch, files) if m]
    count = len(files)
    return numbers == [(f"{i + 1:05}", f"{count:05}") for i in range(count)]


def _shards(
    root: Path, index: str, names: Collection[str], suffixes: Collection[str]
) -> Iterator[str]:
    for shard in sorted(set(_weight_map(root / index, index).values())):
        name = _sibling(index, shard)
        if PurePosixPath(name).suffix not in suffixes:
            raise UnsafeModel(f"{index} lists {name}, which is not a {min(suffixes)} file")
        if name not in names:
            raise IncompleteModel(f"{name} is missing, which {index} lists")
        yield name


def _weight_map(path: Path, index: str) -> dict[str, str]:
    shards = read_json(path, index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise IncompleteModel(f"{index} has no weight_map of tensor to file")
    return shards


def _sibling(index: str, shard: str) -> str:
    """The name in the whole model of a file that an index lists."""
    return (PurePosixPath(index).parent / shard).as_posix()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
