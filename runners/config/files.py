"""The files beside a model that say how it is run: `setup_config.json` and `model-config.yaml`.

A `setup_config.json` travels with its model. Those written for TorchServe's examples are taken as
they were published; what today's libraries no longer know is accepted with a warning that says what
happens instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runners.config import deepspeed as deepspeed_config
from runners.config import mii as mii_config
from runners.config.images import ImageFields
from runners.config.model import (
    SETUP_CONFIG,
    AccelerateConfig,
    DeepSpeedConfig,
    MIIConfig,
    Task,
    engine_model,
    validate,
)
from runners.config.reading import read_json, read_object
from runners.config.torchserve import MODEL_CONFIG, read_model_config
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound, UnsafeModel
from runners.contracts.tasks import IMAGE_TASK, TEXT_TASKS, PipelineTask

MODEL_HEADS = ("model_index.json", "config.json")
MODEL_FOLDER = "model"
"""Where TorchServe's archives, and models in the store, have the model itself."""
HEADS: dict[str, PipelineTask] = {
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
}
"""How the class in a `config.json` ends to what it does."""
OBSOLETE = {
    "low_cpu_mem_usage": "weights are always memory-mapped from safetensors, never loaded twice",
    "offload_state_dict": "no whole state dict exists while loading: nothing to offload",
}


def load_setup_config(
    folder: Path, *, name: str, overrides: Mapping[str, object] | None = None
) -> tuple[AccelerateConfig | DeepSpeedConfig | MIIConfig, list[str]]:
    """Read a model folder's `setup_config.json` and `model-config.yaml` into a RunnerConfig.

    `folder` holds the model itself, or, as in a TorchServe archive, `model/` beside these files, or
    has it where `model_path` says. Without either file it runs on Accelerate with the defaults.
    `overrides` (values of None are skipped) win over the files. Returns the config and a warning
    for every key that no longer means anything.

    Raises: ModelNotFound, IncompleteModel, UnsafeModel (pickled weights), ConfigError (says which
    key is wrong, what is allowed).
    """
    if not folder.is_dir():
        raise ModelNotFound(f"model folder {folder} does not exist")
    wanted = {k: v for k, v in (overrides or {}).items() if v is not None}
    files = setup_files(folder)
    own, warnings = read_setup(files, engine=wanted.get("engine"))
    model_path, more = find_model(folder, own.get("model_path"))
    _refuse_pickles(folder, model_path)
    found = task_of(model_path)
    own.setdefault("task", found)
    if IMAGE_TASK in (own["task"], found) and own["task"] != found:
        raise ConfigError(f"task is {own['task']}, but {model_path} is a model for {found}")
    if own["engine"] == "mii" and own["task"] not in TEXT_TASKS:
        warnings += mii_config.drop_section(own)
    given = {"name": name, "model_path": model_path, "gpu_share": None}
    return validate(own | wanted | given, where=names_of(files)), warnings + more


def task_of(model_path: Path) -> Task:
    """What the head file of a model says that it does. Raises: ConfigError."""
    if (model_path / "model_index.json").is_file():
        return IMAGE_TASK
    names = read_json(model_path / "config.json").get("architectures")
    first = str(names[0]) if isinstance(names, list) and names else ""
    return next((task for head, task in HEADS.items() if first.endswith(head)), "text-generation")


def names_of(files: Sequence[Path]) -> str:
    """What errors call the files that a config was read from."""
    return " and ".join(path.name for path in files) or SETUP_CONFIG


def setup_files(folder: Path, model_config: str = MODEL_CONFIG) -> list[Path]:
    """The files that say how the model of a folder is run, the one that wins last.

    `model_config`: what TorchServe's file is called there.
    """
    for place in (folder, folder / MODEL_FOLDER):
        files = [place / name for name in (model_config, SETUP_CONFIG)]
        if found := [path for path in files if path.is_file()]:
            return found
    return []


def read_setup(
    files: Sequence[Path],
    *,
    engine: object = None,
    read: Callable[[Path], dict[str, Any]] = read_object,
) -> tuple[dict[str, Any], list[str]]:
    """Fields of a RunnerConfig out of `setup_config.json` and `model-config.yaml` of one folder.

    YAML is taken for the latter. The config that a `deepspeed` section names is read in, through
    `read` like `files` themselves. `engine` wins over theirs: it decides which keys mean something.
    Returns the values and the warnings. Raises: ConfigError.
    """
    raw: dict[str, Any] = {}
    warnings: list[str] = []
    for path in files:
        values = read(path)
        if path.suffix in (".yaml", ".yml"):
            values, more = read_model_config(values)
            warnings += more
        raw |= values
    if engine is not None and engine != raw.get("engine", "accelerate"):
        raw["engine"] = engine
        if engine == "accelerate" and raw.pop("tensor_parallel", 1) != 1:
            warnings.append("tensor_parallel is ignored: engine accelerate splits no layers")
        for other in ("deepspeed", "mii"):
            if other != engine and raw.pop(other, None) is not None:
                warnings.append(f"{other} is ignored: it is for engine {other}, not {engine}")
    own, more = parse_setup_config(raw)
    warnings += more
    if own["engine"] == "mii":
        own, more = mii_config.read_section(own)
        warnings += more
    if "deepspeed" in own:
        folder = files[-1].parent
        own["deepspeed"], more = deepspeed_config.read_section(own["deepspeed"], folder, read)
        warnings += more
        # One number is enough: that of the ranks, unless another is asked for.
        own.setdefault("tensor_parallel", deepspeed_config.tp_size(own["deepspeed"]) or 1)
    return own, warnings


def find_model(folder: Path, named: object = None) -> tuple[Path, list[str]]:
    """Where in a folder the model itself lies, and a warning if not where `model_path` says.

    Raises: IncompleteModel.
    """
    places = [folder, folder / MODEL_FOLDER]
    if named is not None:
        places.insert(0, folder / str(named))
    for path in places:
        if any((path / head).is_file() for head in MODEL_HEADS):
            elsewhere = named is not None and path != places[0]
            why = f"model_path is ignored: {places[0]} is not a model folder, {path} is one"
            return path, [why] if elsewhere else []
    raise IncompleteModel(
        f"{places[0]} is not a model folder: it has neither config.json (text) "
        "nor model_index.json (image)"
    )


def _refuse_pickles(folder: Path, model_path: Path) -> None:
    """Raises: UnsafeModel if all its weights are pickles, which are never loaded."""
    names = sorted(path.name for path in model_path.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UnsafeModel(
            f"{pickles[0]} is a pickle, which can carry code, and there are no safetensors: "
            f"`python -m model_store_scripts.import_model {folder} --name NAME "
            "--convert-checkpoints` puts a converted copy into the model store"
        )


def parse_setup_config(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Map published and obsolete keys to today's; null means the default.

    Returns the values and the warnings.
    """
    values, warnings = {k: v for k, v in raw.items() if v is not None}, []
    values.setdefault("engine", "mii" if mii_config.is_forerunners(values) else "accelerate")
    for key, instead in OBSOLETE.items():
        if values.pop(key, None) is not None:
            warnings.append(f"{SETUP_CONFIG}: {key} is obsolete and ignored: {instead}")
    if "torch_dtype" in values:
        old = values.pop("torch_dtype")
        values.setdefault("dtype", old.removeprefix("torch.") if isinstance(old, str) else old)
    known = set(engine_model(values["engine"]).model_fields)
    if values["engine"] == "mii":
        known |= {"model_name", *mii_config.FORERUNNERS}
        if mii_config.is_forerunners(values):
            known |= mii_config.BESIDE
            warnings += _take_mii_example(values)
    for key in sorted(values.keys() - known):
        del values[key]
        warnings.append(f"{SETUP_CONFIG}: unknown key {key} is ignored")
    return values, warnings


def _take_mii_example(values: dict[str, Any]) -> list[str]:
    """Map what TorchServe's MII example has beside `mii_config`: the task, and `model_config`,
    which speaks of every picture. Returns the warnings. Raises: ConfigError.
    """
    if (task := values.pop("task_name", None)) is not None:
        values.setdefault("task", task)
    painting = values.pop("model_config", {})
    if not isinstance(painting, Mapping):
        raise ConfigError(f"{SETUP_CONFIG}: model_config must be an object")
    unknown = set(painting) - ImageFields.model_fields.keys()
    for key in painting.keys() - unknown:
        values.setdefault(key, painting[key])
    return [f"{SETUP_CONFIG}: unknown key model_config.{key} is ignored" for key in sorted(unknown)]
