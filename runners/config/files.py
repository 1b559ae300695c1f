"""The files of a model folder that say how the model is run, read into a RunnerConfig.

A `setup_config.json` belongs to its model. Those written for TorchServe's examples, and its
`model-config.yaml`, are accepted as published; a key without effect gives a warning that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runners.config import deepspeed, mii_files
from runners.config.base import BaseRunnerConfig, ImageConfig, Task
from runners.config.ignored import SETUP_CONFIG_KEYS, drop_ignored
from runners.config.model import SETUP_CONFIG, config_class, fields_of, owners_of, validate
from runners.config.reading import read_json, read_object
from runners.config.support import ADAPTER_CONFIG, adapter_alone, refuse_unsupported
from runners.config.torchserve import MODEL_CONFIG, read_model_config
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound, UnsafeModel
from runners.contracts.tasks import IMAGE_TASK, TEXT_TASKS, PipelineTask

MODEL_HEADS = ("model_index.json", "config.json")
MODEL_FOLDER = "model"
"""The model's own folder in TorchServe's archives and in the model store."""
HEADS: dict[str, PipelineTask] = {
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
}
"""Suffix of the architecture in a `config.json` to the task."""


@dataclass(frozen=True)
class SetupValues:
    """Fields of a RunnerConfig from files, not validated yet."""

    values: dict[str, Any]
    source: str
    """The names of the files, for errors."""
    warnings: list[str] = field(default_factory=list)
    published: frozenset[str] = frozenset()
    """Fields from a file written for TorchServe's handlers, where a field of another task is no
    error."""

    def with_task(
        self, model_path: Path, *, task: object = None, name: str | None = None
    ) -> SetupValues:
        """These values for `task`, else the files', else that of the model in a folder.

        `name` is what errors call the folder; its own name by default.

        Raises: ConfigError for a field of another task, or if the model cannot have the task;
        EngineUnavailable.
        """
        head_task = task_of(model_path)
        values = {"task": head_task} | self.values | ({} if task is None else {"task": task})
        task = values["task"]
        if IMAGE_TASK in (task, head_task) and task != head_task:
            raise ConfigError(
                f"is {task}, but {name or model_path.name} is a model for {head_task}",
                field="task",
            )
        warnings = list(self.warnings)
        if values["engine"] == "mii" and task not in TEXT_TASKS:
            warnings += mii_files.drop_section(values)
        known = config_class(values["engine"], task).model_fields
        for key in sorted(self.published & values.keys() - known.keys()):
            warnings.append(f"{self.source}: {key} is ignored: it belongs to {owners_of(key)}")
            del values[key]
        return replace(self, values=values, warnings=warnings)


def load_setup_config(
    folder: Path, *, name: str, overrides: Mapping[str, object] | None = None
) -> tuple[BaseRunnerConfig, list[str]]:
    """Read a model folder's `setup_config.json` and `model-config.yaml` into a RunnerConfig.

    `folder` contains the model itself, or `model/` next to these files, as a TorchServe archive, or
    the model where `model_path` points. Without either file the model runs on Accelerate with the
    defaults. `overrides` take precedence over the files; values of None are skipped. Returns the
    config and a warning for every key without effect.

    Raises: ModelNotFound, IncompleteModel, UnsafeModel (pickled weights), ConfigError (names the
    wrong key and what is allowed, or a kind of model that no engine runs), EngineUnavailable.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"model folder {folder} does not exist")
    overrides = {k: v for k, v in (overrides or {}).items() if v is not None}
    setup = read_setup(setup_files(folder), engine=overrides.get("engine"))
    model_path, path_warnings = find_model(folder, setup.values.get("model_path"))
    _refuse_pickles(folder, model_path)
    refuse_unsupported(read_json(model_path / "config.json"), source=name)
    setup = setup.with_task(model_path)
    overrides, override_warnings = _applicable(overrides, setup.values)
    derived = {"name": name, "model_path": model_path}
    config = validate(setup.values | overrides | derived, source=setup.source)
    return config, setup.warnings + path_warnings + override_warnings


def _applicable(
    overrides: Mapping[str, object], values: Mapping[str, Any]
) -> tuple[dict[str, object], list[str]]:
    """The overrides without those of the engine's other tasks, and a warning for each of these."""
    engine, task = values["engine"], values["task"]
    known, fields = config_class(engine, task).model_fields, fields_of(engine)
    ignored = [key for key in overrides if key not in known and key in fields]
    applicable = {key: value for key, value in overrides.items() if key not in ignored}
    return applicable, [
        f"{key} is ignored: a model for {task} has no such field" for key in ignored
    ]


def task_of(model_path: Path) -> Task:
    """The task that a model's head file implies. Raises: ConfigError."""
    if (model_path / "model_index.json").is_file():
        return IMAGE_TASK
    names = read_json(model_path / "config.json").get("architectures")
    first = str(names[0]) if isinstance(names, list) and names else ""
    return next((task for head, task in HEADS.items() if first.endswith(head)), "text-generation")


def setup_files(folder: Path, model_config: str = MODEL_CONFIG) -> list[Path]:
    """The files that say how the model of a folder is run, in ascending order of precedence.

    `model_config`: the name of TorchServe's file.
    """
    for parent in (folder, folder / MODEL_FOLDER):
        candidates = [parent / name for name in (model_config, SETUP_CONFIG)]
        if files := [path for path in candidates if path.is_file()]:
            return files
    return []


def read_setup(
    files: Sequence[Path],
    *,
    engine: object = None,
    read: Callable[[Path], dict[str, Any]] = read_object,
) -> SetupValues:
    """Fields of a RunnerConfig from `setup_config.json` and `model-config.yaml` of one folder.

    A YAML file is read as the latter. The config that a `deepspeed` section names is read too,
    through `read` like `files`. `engine` takes precedence over the files': it decides which keys
    have an effect. Raises: ConfigError.
    """
    raw: dict[str, Any] = {}
    warnings: list[str] = []
    published: set[str] = set()
    for path in files:
        values = read(path)
        if path.suffix in (".yaml", ".yml"):
            values, yaml_warnings = read_model_config(values)
            warnings += yaml_warnings
            published |= values.keys()
        else:
            published = (
                published | values.keys() if _is_legacy(values) else published - values.keys()
            )
        raw |= values
    if engine is not None and engine != raw.get("engine", "accelerate"):
        raw["engine"] = engine
        if engine == "accelerate" and raw.pop("tensor_parallel", 1) != 1:
            warnings.append("tensor_parallel is ignored: engine accelerate splits no layers")
    values, more = parse_setup_config(raw)
    warnings += more
    if values["engine"] == "mii":
        values, more = mii_files.read_section(values)
        warnings += more
    if "deepspeed" in values:
        section, more = deepspeed.read_section(values["deepspeed"], files[-1].parent, read)
        warnings += more
        size = deepspeed.tp_size(section)
        ranks = values.setdefault("tensor_parallel", size or 1)
        if size not in (None, ranks):
            warnings.append(
                f"{deepspeed.DS_CONFIG}: tensor_parallel.tp_size {size} is ignored: tensor_parallel"
                f" (or torchrun's nproc-per-node) is {ranks}"
            )
        # One number stays, so that an override cannot contradict another.
        values["deepspeed"] = deepspeed.without_tp_size(section)
    source = " and ".join(path.name for path in files) or SETUP_CONFIG
    return SetupValues(values, source, warnings, frozenset(published))


def find_model(
    folder: Path, named: object = None, *, name_of: Callable[[Path], str] = str
) -> tuple[Path, list[str]]:
    """The model's own folder, and a warning if it is not where `model_path` points.

    `name_of` gives what messages call a path. Raises: IncompleteModel.
    """
    candidates = [folder, folder / MODEL_FOLDER]
    if named is not None:
        candidates.insert(0, folder / str(named))
    for path in candidates:
        if any((path / head).is_file() for head in MODEL_HEADS):
            elsewhere = named is not None and path != candidates[0]
            reason = f"{name_of(candidates[0])} is not a model folder, {name_of(path)} is one"
            return path, [f"model_path is ignored: {reason}"] if elsewhere else []
    for path in candidates:
        adapter = path / ADAPTER_CONFIG
        if adapter.is_file():
            config = read_json(adapter, name_of(adapter))
            raise adapter_alone(config, source=name_of(path))
    raise IncompleteModel(
        f"{name_of(candidates[0])} is not a model folder: it has neither config.json (text) "
        "nor model_index.json (image)"
    )


def parse_setup_config(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Map published and obsolete keys to today's; null means the default.

    Returns the values and the warnings. Raises: ConfigError if there is no such engine.
    """
    values = {k: v for k, v in raw.items() if v is not None}
    engine = values.setdefault("engine", "mii" if _is_legacy(values) else "accelerate")
    config_class(engine, "text-generation")
    warnings = drop_ignored(values, SETUP_CONFIG_KEYS, source=SETUP_CONFIG)
    if "torch_dtype" in values:
        dtype = values.pop("torch_dtype")
        name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
        values.setdefault("dtype", name)
    known = set(fields_of(engine))
    if engine == "mii":
        known |= {"model_name", *mii_files.LEGACY_SECTIONS}
        if mii_files.is_legacy(values):
            known |= mii_files.TOP_LEVEL_KEYS
            warnings += _read_mii_example(values)
    elsewhere = fields_of()
    for key in sorted(values.keys() - known):
        del values[key]
        engines = sorted({str(c.model_fields["engine"].default) for c in elsewhere.get(key, [])})
        warnings.append(
            f"{key} is ignored: it is for engine {' and '.join(engines)}, not {engine}"
            if engines
            else f"{SETUP_CONFIG}: unknown key {key} is ignored"
        )
    return values, warnings


def _is_legacy(values: Mapping[str, Any]) -> bool:
    return "engine" not in values and mii_files.is_legacy(values)


def _read_mii_example(values: dict[str, Any]) -> list[str]:
    """Map what TorchServe's MII example has besides `mii_config`: the task, and `model_config`, the
    defaults of every image. Returns the warnings. Raises: ConfigError.
    """
    if (task := values.pop("task_name", None)) is not None:
        values.setdefault("task", task)
    image_defaults = values.pop("model_config", {})
    if not isinstance(image_defaults, Mapping):
        raise ConfigError("must be an object", field="model_config", source=SETUP_CONFIG)
    unknown = set(image_defaults) - ImageConfig.model_fields.keys()
    for key in image_defaults.keys() - unknown:
        values.setdefault(key, image_defaults[key])
    return [f"{SETUP_CONFIG}: unknown key model_config.{key} is ignored" for key in sorted(unknown)]


def _refuse_pickles(folder: Path, model_path: Path) -> None:
    """Raises: UnsafeModel if all weights are pickles, which are never loaded."""
    names = sorted(path.name for path in model_path.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UnsafeModel(
            f"{pickles[0]} is a pickle, which can carry code, and there are no safetensors: "
            f"`python -m model_store_scripts.import_model {folder} --name NAME "
            "--convert-checkpoints` puts a converted copy into the model store"
        )
