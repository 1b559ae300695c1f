"""TorchServe's DeepSpeed set-up, as it was published: what is made of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runners.config.deepspeed import KEYS, without_tp_size
from runners.config.files import load_setup_config
from runners.config.model import DeepSpeedTextConfig, MIITextConfig
from runners.config.torchserve import read_model_config
from runners.contracts.errors import ConfigError, UnsafeModel
from tests.support.torchserve import DS_CONFIG, MII_MODEL_CONFIG, edit, published


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The published files with a model that nothing is loaded of."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "config.json").write_text("{}")
    return published(tmp_path)


def load(folder: Path, **overrides: object) -> DeepSpeedTextConfig:
    config, _ = load_setup_config(folder, name="m", overrides=overrides)
    assert isinstance(config, DeepSpeedTextConfig)
    return config


def warnings(folder: Path) -> list[str]:
    return load_setup_config(folder, name="m")[1]


def test_the_published_files_are_taken_as_they_are(folder: Path) -> None:
    config = load(folder)
    assert config.model_path == folder / "checkpoints"
    assert (config.tensor_parallel, config.step_timeout) == (2, 120)
    assert (config.max_length, config.max_new_tokens) == (80, 50)
    assert config.deepspeed == without_tp_size(DS_CONFIG)
    assert config.chosen_dtype == "float16"
    assert [w.split(" is ignored: ")[0] for w in warnings(folder)] == [
        f"model-config.yaml: {key}"
        for key in ("minWorkers", "maxWorkers", "maxBatchDelay", "deviceType", "deviceIds")
    ] + [
        *("model-config.yaml: handler.model_name", "model-config.yaml: handler.manual_seed"),
        "ds-config.json: checkpoint",
    ]


def test_what_deepspeed_has_no_use_for_here_is_named_and_dropped(folder: Path) -> None:
    published(folder, base_dir="/data", max_out_tokens=99, tensor_paralel={})
    assert load(folder).deepspeed == without_tp_size(DS_CONFIG)
    told = [w.removeprefix("ds-config.json: ") for w in warnings(folder) if w.startswith("ds-")]
    assert [w.partition(" is ignored")[0] for w in told] == [
        *("base_dir", "max_out_tokens", "checkpoint", "unknown key tensor_paralel"),
    ]


def test_the_keys_are_deepspeeds() -> None:
    fields = pytest.importorskip("deepspeed.inference.config").DeepSpeedInferenceConfig.model_fields
    names = {name for name, field in fields.items()} | {f.alias for f in fields.values() if f.alias}
    assert names - {"config", "args"} == KEYS


@pytest.mark.parametrize(
    "section",
    [{"config": "ds-config.json"}, {"config": DS_CONFIG}, DS_CONFIG],
    ids=["file", "object", "inline"],
)
def test_a_setup_config_has_it_by_name_or_in_itself(folder: Path, section: Any) -> None:
    (folder / "model-config.yaml").unlink()
    (folder / "checkpoints").rename(folder / "model")
    setup = {"engine": "deepspeed", "deepspeed": section}
    (folder / "setup_config.json").write_text(json.dumps(setup))
    config = load(folder)
    assert (config.deepspeed, config.tensor_parallel) == (without_tp_size(DS_CONFIG), 2)


def test_setup_config_wins_over_model_config(folder: Path) -> None:
    (folder / "setup_config.json").write_text(json.dumps({"max_length": 7}))
    assert (load(folder).max_length, load(folder).max_new_tokens) == (7, 50)


def test_a_model_path_that_is_none(folder: Path) -> None:
    edit(folder, '"checkpoints"', "/path/to/model/checkpoints")
    (folder / "checkpoints").rename(folder / "model")
    assert load(folder).model_path == folder / "model"
    assert "model_path is ignored: /path/to/model/checkpoints is not a" in warnings(folder)[-1]


def test_miis_example_for_text(folder: Path) -> None:
    (folder / "model-config.yaml").write_text(MII_MODEL_CONFIG)
    (folder / "checkpoints").rename(folder / "model")
    config, told = load_setup_config(folder, name="m")
    assert isinstance(config, MIITextConfig)
    assert (config.tensor_parallel, config.max_new_tokens, config.max_length) == (4, 256, None)
    assert (config.mii.max_length, config.step_timeout) == (4096, 1200)
    assert not any("unknown" in warning or "nproc" in warning for warning in told)
    assert load(folder, engine="deepspeed").tensor_parallel == 4
    edit(folder, "nproc-per-node: 4", "nproc-per-node: 2")
    with pytest.raises(ConfigError, match=r"nproc-per-node is 2, .*tensor_parallel is 4: they mu"):
        load_setup_config(folder, name="m")
    edit(folder, "    nproc-per-node: 2\n", "    nnodes: 2\n")
    assert "torchrun.nnodes is ignored" in " ".join(load_setup_config(folder, name="m")[1])


DEEPSPEED = "deepspeed:\n    config: ds-config.json\n    checkpoint: checkpoints.json\n"


def rewrite(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def ds_config(**values: object) -> Any:
    return lambda folder: published(folder, **values)


def change(*pairs: str) -> Any:
    def spoil(folder: Path) -> None:
        for old, new in zip(pairs[::2], pairs[1::2], strict=True):
            edit(folder, old, new)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change(DEEPSPEED, "deepspeed: {}\n"), "deepspeed.config: is missing: the name of"),
        (change(DEEPSPEED, "deepspeed:\n"), "deepspeed.config: is missing: the name of"),
        (change("config: ds-config.json", "config:"), "deepspeed.config: is missing: the name of"),
        (change('"tp"', "custom", DEEPSPEED, "deepspeed:\n"), "deepspeed.config: is missing"),
        (change("ds-config.json", "[a]"), "deepspeed.config: must be a file name or an object"),
        (change(DEEPSPEED, "deepspeed:\n    - a\n"), "deepspeed: must be a mapping"),
        (lambda f: (f / "ds-config.json").unlink(), "ds-config.json does not exist"),
        (rewrite("ds-config.json", "{"), "ds-config.json cannot be read as JSON: "),
        (rewrite("ds-config.json", "[]"), "ds-config.json must contain a JSON object, not list"),
        (ds_config(tensor_parallel={"tp_size": "2"}), "tp_size: must be an integer from 1"),
        (ds_config(dtype="int8"), "dtype: must be one of bfloat16, float16, float32"),
        (change('"tp"', '"pp"'), "parallelType: pp is not supported, only tp is"),
        (change('parallelType: "tp"', "a: [b"), "model-config.yaml cannot be read as YAML: "),
        (rewrite("model-config.yaml", "a"), "model-config.yaml must contain keys and values"),
        (rewrite("model-config.yaml", "a: " + "[" * 3000), "cannot be read as YAML: "),
        (rewrite("model-config.yaml", "a: &a {b: *a}"), "YAMLError: an alias (*a)"),
        (rewrite("model-config.yaml", f"a: 0x{'f' * 9999}"), "cannot be read as YAML: "),
        (rewrite("model-config.yaml", "a: " + "[" * 150 + "]" * 150), "is nested more than 100"),
        (change("handler:", "handler: 3\nx:"), "handler: must be a mapping"),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, spoil: Any, said: str) -> None:
    load(folder)
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert said.format(folder=folder) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_byte_order_mark_and_dates_are_taken(folder: Path) -> None:
    edit(folder, '"facebook/opt-30b"', "2020-01-01\n    1: 2")
    (folder / "setup_config.json").write_text('{"max_length": 7}', encoding="utf-8-sig")
    text = (folder / "model-config.yaml").read_text()
    (folder / "model-config.yaml").write_text(text, encoding="utf-8-sig")
    assert (load(folder).max_length, load(folder).tensor_parallel) == (7, 2)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.bin", "a.pt"])
def test_pickled_weights_are_refused_with_what_to_do(folder: Path, name: str) -> None:
    (folder / "checkpoints" / name).write_bytes(b"")
    with pytest.raises(UnsafeModel, match="pickle, which can carry code") as caught:
        load(folder)
    command = f"`python -m model_store_scripts.import_model {folder} --name NAME --convert-checkp"
    assert command in caught.value.message
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"")
    load(folder)


def test_the_nodes_that_torchrun_was_told_of_are_ours(folder: Path) -> None:
    edit(
        folder, "nproc-per-node: 2", "nproc-per-node: 1\n    nnodes: 2\n    rdzv-endpoint: a:29400"
    )
    config = load(folder)
    assert (config.tensor_parallel, config.nnodes, config.rdzv_endpoint) == (2, 2, "a:29400")
    assert (config.local_world_size, config.rendezvous) == (1, "a:29400")


def test_an_engine_that_splits_nothing_may_take_over(folder: Path) -> None:
    config, told = load_setup_config(folder, name="m", overrides={"engine": "accelerate"})
    assert (config.engine, config.tensor_parallel) == ("accelerate", 1)
    assert "tensor_parallel is ignored: engine accelerate splits no layers" in told


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tensor_parallel": 2}, "tensor_parallel: must be an object"),
        ({"dtype": ["fp16"]}, "dtype: must be one of bfloat16, float16, float32"),
        ({"dtype": "int8"}, "dtype: must be one of bfloat16, float16, float32"),
    ],
)
def test_what_no_deepspeed_config_may_hold_is_refused(
    folder: Path, change: dict[str, Any], problem: str
) -> None:
    published(folder, **change)
    with pytest.raises(ConfigError, match=problem):
        load(folder)


def test_an_error_names_the_file_it_is_in(folder: Path) -> None:
    edit(folder, "responseTimeout: 120", "responseTimeout: 0")
    with pytest.raises(ConfigError, match=r"^model-config.yaml: step_timeout: "):
        load(folder)


@pytest.mark.parametrize("overrides", [{}, {"tensor_parallel": 3}])
def test_torchruns_processes_are_the_ranks_and_an_override_has_the_last_word(
    folder: Path, overrides: dict[str, int]
) -> None:
    change("nproc-per-node: 2", "nproc-per-node: 4")(folder)
    config, warnings = load_setup_config(folder, name="m", overrides=overrides)
    assert config.world_size == overrides.get("tensor_parallel", 4)
    [warning] = [each for each in warnings if "tp_size" in each]
    assert warning.startswith("ds-config.json: tensor_parallel.tp_size 2 is ignored: ")
    assert "nproc-per-node) is 4" in warning


def test_tensor_parallel_needs_no_config_of_deepspeed(folder: Path) -> None:
    """As in TorchServe's gpt_fast and tp_llama examples."""
    change(DEEPSPEED, "")(folder)
    config: Any
    config, _ = load_setup_config(folder, name="m")
    assert (config.engine, config.world_size, config.deepspeed) == ("deepspeed", 2, {})


def test_handler_options_with_our_names_have_their_effect() -> None:
    content = {
        "startupTimeout": 1800,
        "handler": {
            "num_inference_steps": 30,
            "guidance_scale": 4.0,
            "max_batch_images": 2,
            "max_new_tokens": 50,
            "temperature": 0.6,
            "engine": "steam",
            "name": "x",
        },
    }
    values, warnings = read_model_config(content)
    assert values == {
        "start_timeout": 1800,
        "num_inference_steps": 30,
        "guidance_scale": 4.0,
        "max_batch_images": 2,
        "max_new_tokens": 50,
    }
    ignored = {warning.split(" is ignored")[0].rpartition(" ")[2] for warning in warnings}
    assert ignored == {"handler.temperature", "handler.engine", "handler.name"}
