"""Choices of models that cannot be served, and the sentence that says what to choose instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import bentoml
import pytest

from model_choice import chosen_runners
from runners.contracts.errors import ConfigError, ModelNotFound
from settings import Settings


@pytest.fixture
def small(store: Path, llama: Path) -> str:
    """A text model in the store; its name."""
    with bentoml.models.create("small") as model:
        shutil.copytree(llama, model.path, dirs_exist_ok=True)
    return "small"


@pytest.mark.parametrize("choice", ["smal", "/no/such/folder", "~nobodyhere/x"])
@pytest.mark.usefixtures("small")
def test_an_unknown_model_is_refused_with_a_list_of_the_store(choice: str) -> None:
    with pytest.raises(ModelNotFound, match="small:"):
        chosen_runners(choice, "", Settings())


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither config\.json"):
        chosen_runners(str(tmp_path), "", Settings())


def test_each_of_two_models_must_exist(small: str) -> None:
    with pytest.raises(ModelNotFound, match="x is neither"):
        chosen_runners(small, "x", Settings())


def test_a_text_model_is_no_image_model(small: str) -> None:
    sentence = "a model for text-generation: choose it with TRIPTYCH_TEXT_MODEL"
    with pytest.raises(ConfigError, match=sentence):
        chosen_runners("", small, Settings())
