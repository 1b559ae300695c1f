"""RunnerConfig and Settings: published files are taken, mistakes are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runners import create_runner
from runners.config.base import DERIVED_FIELDS, ImageConfig
from runners.config.files import load_setup_config, parse_setup_config
from runners.config.model import AccelerateTextConfig, validate
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound
from settings import Settings, get_settings
from tests.support.archives import ACCELERATE


def folder(path: Path, setup: object = None, *, inside: str = "") -> Path:
    (path / inside).mkdir(parents=True, exist_ok=True)
    (path / inside / "config.json").write_text("{}")
    if setup is not None:
        (path / "setup_config.json").write_text(
            setup if isinstance(setup, str) else json.dumps(setup)
        )
    return path


@pytest.mark.parametrize("inside", ["", "model"])
def test_the_published_accelerate_file_is_taken_as_it_is(tmp_path: Path, inside: str) -> None:
    config: Any
    config, warnings = load_setup_config(folder(tmp_path, ACCELERATE, inside=inside), name="bloom")
    assert isinstance(config, AccelerateTextConfig)
    assert config.max_memory == {0: "10GiB", 1: "10GiB", "cpu": "30GiB"}
    assert (config.dtype, config.max_length) == ("float16", 50)
    assert (config.device_map, config.offload_folder) == ("auto", "offload")
    assert config.model_path == tmp_path / inside
    assert [w.split(" is ignored")[0] for w in warnings] == [
        "setup_config.json: low_cpu_mem_usage",
        "setup_config.json: offload_state_dict",
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "auto"])
def test_all_published_dtypes(dtype: str) -> None:
    values, _ = parse_setup_config({"torch_dtype": dtype})
    assert values["dtype"] == dtype
    assert parse_setup_config({"torch_dtype": f"torch.{dtype}"})[0]["dtype"] == dtype


def test_a_folder_without_setup_config_runs_on_accelerate(tmp_path: Path) -> None:
    config: Any
    config, warnings = load_setup_config(folder(tmp_path), name="plain")
    assert (config.engine, config.device_map, warnings) == ("accelerate", "auto", [])


def test_unknown_keys_are_named_not_fatal() -> None:
    values, warnings = parse_setup_config({"max_lenght": 5})
    assert "max_lenght" not in values
    assert warnings == ["setup_config.json: unknown key max_lenght is ignored"]


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"torch_dtype": "float8"}, "dtype: Input should be 'auto', 'float16'"),
        ({"max_length": 0}, "max_length: Input should be greater than or equal to 1"),
        ({"max_memory": "10GiB"}, "max_memory: Input should be a valid dictionary"),
        ({"engine": "vllm"}, "engine: must be one of accelerate, deepspeed, mii"),
        ({"tensor_parallel": 2}, "tensor_parallel: Input should be 1"),
        ("{not json", "cannot be read as JSON"),
        ("[1]", "must contain a JSON object, not list"),
    ],
)
def test_wrong_values_name_the_key_and_what_is_allowed(
    tmp_path: Path, setup: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=r"setup_config\.json") as caught:
        load_setup_config(folder(tmp_path, setup), name="wrong")
    assert message in caught.value.message


def test_overrides_win_and_none_does_not_count(tmp_path: Path) -> None:
    config: Any
    config, _ = load_setup_config(
        folder(tmp_path, {"max_kv_tokens": 100, "max_batch_size": 4}),
        name="m",
        overrides={"max_kv_tokens": 200, "max_batch_size": None},
    )
    assert (config.max_kv_tokens, config.max_batch_size) == (200, 4)


def test_missing_and_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        load_setup_config(tmp_path / "nowhere", name="m")
    with pytest.raises(IncompleteModel, match=r"neither config\.json"):
        load_setup_config(tmp_path, name="m")


def test_a_model_of_another_task_is_refused_with_a_sentence() -> None:
    config = validate({"engine": "mii", "name": "m", "model_path": ".", "task": "text-to-image"})
    assert isinstance(config, ImageConfig)
    assert create_runner(config).task == "text-to-image"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TRIPTYCH_MAX_QUEUE", "0", "TRIPTYCH_MAX_QUEUE: Input should be greater than or equal"),
        ("TRIPTYCH_TEXT_ENGINE", "vllm", "TRIPTYCH_TEXT_ENGINE: Input should be 'accelerate'"),
        ("PORT", "99999", "PORT: Input should be less than or equal to 65535"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    get_settings.cache_clear()
    with pytest.raises(ConfigError) as caught:
        get_settings()
    get_settings.cache_clear()
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_the_api_key_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_API_KEY", "hunter2")
    assert "hunter2" not in repr(Settings())


@pytest.mark.parametrize("module", ["settings", "runners.config.model"])
def test_documentation_is_generated_from_the_types(module: str) -> None:
    out = subprocess.run(
        [sys.executable, "-W", "error", "-m", module], capture_output=True, text=True, check=True
    ).stdout
    wanted: dict[str, Any] = {"settings": Settings, "runners.config.model": AccelerateTextConfig}
    for field in set(wanted[module].model_fields) - DERIVED_FIELDS:
        assert f"{field}`" in out.lower(), field
    assert all(line.split("|")[3].strip() for line in out.splitlines() if line.startswith("| `"))


@pytest.mark.parametrize("engine", [{}, {"engine": "mii"}])
def test_miis_published_image_config_is_taken(tmp_path: Path, engine: dict[str, str]) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    published = {"model_name": "stabilityai/stable-diffusion-2-1", "task": "text-to-image"}
    (tmp_path / "setup_config.json").write_text(json.dumps(published | engine))
    config: Any
    config, _ = load_setup_config(tmp_path, name="painter")
    assert (config.task, config.engine) == ("text-to-image", "mii")


def test_a_pipelines_folder_alone_is_an_image_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    config: Any
    config, warnings = load_setup_config(tmp_path, name="painter")
    assert (config.task, config.max_batch_images, warnings) == ("text-to-image", 8, [])


@pytest.mark.parametrize(
    ("setup", "field", "owner"),
    [
        ({"vae_tiling": True}, "vae_tiling", "an image model"),
        ({"engine": "deepspeed", "cpu_offload": "model"}, "cpu_offload", "an image model"),
    ],
)
def test_a_field_of_another_task_is_an_error_that_says_where_it_belongs(
    tmp_path: Path, setup: dict[str, Any], field: str, owner: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_setup_config(folder(tmp_path, setup), name="m")
    assert caught.value.field == field
    assert owner in caught.value.reason
    assert "and this is a text model on" in caught.value.reason


def test_text_fields_on_an_image_model_are_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "setup_config.json").write_text(json.dumps({"max_kv_tokens": 64}))
    with pytest.raises(ConfigError, match=r"max_kv_tokens: belongs to a text model on Accelerate"):
        load_setup_config(tmp_path, name="m")


def test_a_published_file_may_have_fields_of_another_task(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "model-config.yaml").write_text("handler:\n    max_length: 50\n")
    config, warnings = load_setup_config(tmp_path, name="m")
    assert config.task == "text-to-image"
    assert any("max_length is ignored: it belongs to a text model" in each for each in warnings)


def test_a_setting_of_another_task_is_ignored_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    config, warnings = load_setup_config(tmp_path, name="m", overrides={"max_kv_tokens": 64})
    assert config.task == "fill-mask"
    assert warnings == ["max_kv_tokens is ignored: a model for fill-mask has no such field"]
