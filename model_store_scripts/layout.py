"""Which files of a model folder make up the model, and whether they are all there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from runners.config.files import task_of
from runners.config.model import SETUP_CONFIG
from runners.config.reading import read_json
from runners.contracts.errors import ConfigError, IncompleteModel, UnsafeModel
from runners.hf.weights import Header, read_header

CARRIED = (
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
NOT_CARRIED = (SETUP_CONFIG, "*.index.json", "adapter_config.json", "trainer_state.json")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
# What a training run leaves beside its weights.
NO_WEIGHTS = ("training_args*", "optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_*")

TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
# transformers reads these through a package that Triptych does not bring.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")

_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.[a-z]+")


@dataclass(frozen=True)
class Part:
    """One folder of a model: the whole of a text model, or one component of a pipeline."""

    folder: str
    config: tuple[str, ...] = ()
    weights: str = ""
    """What a weight file is called before `.safetensors`; empty for a part without weights."""
    tokenizer: bool = False

    def path(self, name: str) -> str:
        """A file of this part by its name in the whole model."""
        return f"{self.folder}/{name}" if self.folder else name

    def files(self, names: Collection[str]) -> list[str]:
        """The names of this part's own files, folders below it aside."""
        start = f"{self.folder}/" if self.folder else ""
        return sorted(
            n.removeprefix(start)
            for n in names
            if n.startswith(start) and n.count("/") == start.count("/")
        )


@dataclass(frozen=True)
class Pickles:
    """Pickled weights of a part, to be converted; file names as in the whole model."""

    part: Part
    files: tuple[str, ...]


@dataclass
class Chosen:
    """The weights of a model: safetensors (with their indexes), and pickles to convert."""

    files: list[str] = field(default_factory=list)
    pickles: list[Pickles] = field(default_factory=list)


def parts_of(root: Path) -> list[Part]:
    """The parts the folder's head file asks for. Raises: ConfigError (unreadable head)."""
    if task_of(root) != "text-to-image":
        return [Part("", config=("config.json",), weights="model", tokenizer=True)]
    parts = [Part("", config=("model_index.json",))]
    for name, value in read_json(root / "model_index.json").items():
        if isinstance(value, list) and value != [None, None]:
            parts.append(_component(name, *map(str, value)))
    return parts


def _component(name: str, library: str, kind: str) -> Part:
    if PurePosixPath(name).name != name:
        raise UnsafeModel(f"model_index.json has a component called {name!r}")
    if "Scheduler" in kind:
        return Part(name, config=("scheduler_config.json",))
    if "Tokenizer" in kind:
        return Part(name, tokenizer=True)
    if kind.endswith(("Processor", "FeatureExtractor")):
        return Part(name, config=("preprocessor_config.json", "processor_config.json"))
    weights = "diffusion_pytorch_model" if library == "diffusers" else "model"
    return Part(name, config=("config.json",), weights=weights)


def small_files(parts: list[Part], names: Collection[str]) -> list[str]:
    """Configurations, tokenizers, templates and licences: what goes along as it is."""
    small = []
    for part in parts:
        small += [
            part.path(name)
            for name in part.files(names)
            if _matches(name, CARRIED) and not _matches(name, NOT_CARRIED)
        ]
        templates = part.path("additional_chat_templates/")
        small += [n for n in names if n.startswith(templates) and n.endswith(".jinja")]
    return sorted(small)


def indexes(parts: list[Part], names: Collection[str]) -> list[str]:
    """The shard indexes, which say what weight files there are."""
    return [p.path(n) for p in parts for n in p.files(names) if n.endswith(".index.json")]


def refuse_incomplete(parts: list[Part], names: Collection[str]) -> None:
    """Every part has its configuration and, where it needs one, a tokenizer.

    Raises: IncompleteModel that names what is missing.
    """
    for part in parts:
        if part.config and not any(part.path(c) in names for c in part.config):
            raise IncompleteModel(f"{part.path(part.config[0])} is missing")
        if part.tokenizer and not any(
            all(part.path(n) in names for n in files) for files in TOKENIZERS
        ):
            _refuse_without_tokenizer(part, names)


def _refuse_without_tokenizer(part: Part, names: Collection[str]) -> None:
    wanted = part.path("tokenizer.json")
    found = next((part.path(n) for n in SENTENCEPIECE if part.path(n) in names), None)
    if found is None:
        raise IncompleteModel(f"{wanted} is missing: the model has no tokenizer")
    if find_spec("sentencepiece") is None:
        raise IncompleteModel(
            f"{wanted} is missing: {found} alone needs the sentencepiece package, which is not "
            "part of this build"
        )


def choose_weights(
    root: Path, parts: list[Part], names: Collection[str], *, convert: bool
) -> Chosen:
    """The weight files of every part, safetensors before pickles.

    Raises: IncompleteModel that names a missing file; UnsafeModel for pickled weights unless
    `convert`; ConfigError if it can not be told which pickles are the weights.
    """
    chosen = Chosen()
    for part in parts:
        if not part.weights:
            continue
        single = part.path(f"{part.weights}.safetensors")
        index = f"{single}.index.json"
        if single in names:
            chosen.files.append(single)
        elif index in names:
            chosen.files += [index, *_shards(root, index, names, {".safetensors"})]
        else:
            chosen.pickles.append(_pickles(root, part, names, convert=convert))
    return chosen


def read_headers(files: Mapping[str, Path]) -> dict[str, Header]:
    """The headers of the safetensors among `files`, compared with the indexes among them.

    Raises: IncompleteModel that names the file that is truncated, damaged or lacks a tensor.
    """
    headers = {n: read_header(p, n) for n, p in files.items() if n.endswith(".safetensors")}
    for index in (n for n in files if n.endswith(".index.json")):
        for tensor, shard in _weight_map(files[index], index).items():
            if tensor not in headers[_beside(index, shard)].tensors:
                raise IncompleteModel(f"{_beside(index, shard)} lacks {tensor}, named in {index}")
    return headers


def refuse_pointers(root: Path, files: list[str]) -> None:
    """No file is a Git LFS pointer instead of its content. Raises: IncompleteModel."""
    for name in files:
        path = root / name
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise IncompleteModel(
                f"{name} is a Git LFS pointer: fetch the file with `git lfs pull`"
            )


def _pickles(root: Path, part: Part, names: Collection[str], *, convert: bool) -> Pickles:
    stem = "pytorch_model" if part.weights == "model" else part.weights
    index = part.path(f"{stem}.bin.index.json")
    found = [
        part.path(name)
        for name in part.files(names)
        if PurePosixPath(name).suffix in PICKLES and not _matches(name, NO_WEIGHTS)
    ]
    if not found:
        raise IncompleteModel(f"{part.path(part.weights)}.safetensors is missing")
    if not convert:
        raise UnsafeModel(
            f"{found[0]} is a pickle, which can carry code, and there are no safetensors: "
            "--convert-checkpoints converts it without running any"
        )
    if index in names:
        return Pickles(part, tuple(_shards(root, index, names, PICKLES)))
    if part.path(f"{stem}.bin") in found:
        return Pickles(part, (part.path(f"{stem}.bin"),))
    if len(found) == 1 or _whole_set(found):
        return Pickles(part, tuple(found))
    raise ConfigError(f"which of {', '.join(found)} are the weights? {stem}.bin is not there")


def _whole_set(files: list[str]) -> bool:
    numbers = [m.groups() for m in map(_SHARD.fullmatch, files) if m]
    count = len(files)
    return numbers == [(f"{i + 1:05}", f"{count:05}") for i in range(count)]


def _shards(
    root: Path, index: str, names: Collection[str], suffixes: Collection[str]
) -> Iterator[str]:
    for shard in sorted(set(_weight_map(root / index, index).values())):
        name = _beside(index, shard)
        if PurePosixPath(name).suffix not in suffixes:
            raise UnsafeModel(f"{index} names {name}, which is not a {min(suffixes)} file")
        if name not in names:
            raise IncompleteModel(f"{name} is missing, which {index} names")
        yield name


def _weight_map(path: Path, index: str) -> dict[str, str]:
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise IncompleteModel(f"{index} has no weight_map of tensor to file")
    return shards


def _beside(index: str, shard: str) -> str:
    return (PurePosixPath(index).parent / shard).as_posix()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
