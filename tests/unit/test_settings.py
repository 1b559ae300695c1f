"""The environment: what a wrong, blank or misspelt variable leads to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_choice import model_config
from runners.contracts.errors import ConfigError, ModelNotFound
from settings import Settings, get_settings, unknown_variables


@pytest.fixture(autouse=True)
def _read_anew() -> None:
    get_settings.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_key_from_a_file_may_end_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_API_KEY", " geheim\n")
    key = get_settings().api_key
    assert key is not None
    assert key.get_secret_value() == "geheim"


@pytest.mark.parametrize("blank", ["", "\n"])
def test_a_blank_key_is_no_key_to_serve_with(monkeypatch: pytest.MonkeyPatch, blank: str) -> None:
    monkeypatch.setenv("TRIPTYCH_API_KEY", blank)
    with pytest.raises(ConfigError, match=r"^TRIPTYCH_API_KEY: is blank"):
        get_settings()


def test_other_empty_variables_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIPTYCH_TEXT_ENGINE", "TRIPTYCH_MAX_QUEUE", "TRIPTYCH_TEXT_MODEL", "PORT"):
        monkeypatch.setenv(name, "")
    assert get_settings() == Settings.model_construct()


def test_misspelt_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_MAX_QUEUE", "5")
    assert unknown_variables() is None
    monkeypatch.setenv("TRIPTYCH_MAX_QEUE", "5")
    monkeypatch.setenv("TRIPTYCH_PORT", "80")
    monkeypatch.setenv("TRIPTYCH_WIBBLE", "1")
    assert unknown_variables() == (
        "unknown variables are ignored: TRIPTYCH_MAX_QEUE (did you mean TRIPTYCH_MAX_QUEUE?), "
        "TRIPTYCH_PORT (did you mean PORT?), TRIPTYCH_WIBBLE"
    )


def test_aliases_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_MODEL_ALIASES", "gpt-*, dummy,tgi")
    assert get_settings().model_aliases == ("gpt-*", "dummy", "tgi")
    get_settings.cache_clear()
    monkeypatch.setenv("TRIPTYCH_MODEL_ALIASES", "gpt-*,,tgi")
    with pytest.raises(ConfigError, match=r"^TRIPTYCH_MODEL_ALIASES"):
        get_settings()


@pytest.mark.parametrize("choice", ["~nobodyhere/x", "x" * 5000, "not a tag"])
def test_a_choice_that_can_not_exist_is_not_found(choice: str) -> None:
    with pytest.raises(ModelNotFound, match="neither a folder nor a tag"):
        model_config(choice, Settings())


def test_the_variable_at_fault_is_named_with_the_reason(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config(str(folder), Settings(tensor_parallel=2, max_batch_size=4))
    assert "TRIPTYCH_TENSOR_PARALLEL=2" in caught.value.message
    assert "Accelerate places layers, it does not split them" in caught.value.message
    assert "setup_config.json" not in caught.value.message


def test_an_engine_that_the_file_does_not_suit_is_named(folder: Path) -> None:
    setup = {"deepspeed": {"dtype": "int3"}}
    (folder / "setup_config.json").write_text(json.dumps(setup))
    with pytest.raises(ConfigError) as caught:
        model_config(str(folder), Settings(text_engine="deepspeed", num_threads=1))
    assert caught.value.message.startswith("TRIPTYCH_TEXT_ENGINE=deepspeed does not fit")
    assert "dtype: must be one of" in caught.value.message


def test_a_fault_of_the_file_is_the_files(folder: Path) -> None:
    (folder / "setup_config.json").write_text(json.dumps({"tensor_parallel": 2}))
    with pytest.raises(ConfigError, match=r"^setup_config\.json: tensor_parallel"):
        model_config(str(folder), Settings(max_batch_size=4))
