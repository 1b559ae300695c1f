"""What no engine runs is refused by its import and by the service, in the same words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers as df
import pytest

from model_store_scripts.importing import ImportRequest, import_model
from runners.config.files import load_setup_config
from runners.config.support import NATIVE_QUANTIZERS, QUANTIZERS
from runners.contracts.errors import ConfigError, IncompleteModel
from runners.hf.models import load_tokenizer
from runners.images.pipeline import load_pipeline
from tests.support.image_models import write_image_model
from tests.support.model_store import edit_json, is_empty

ENCODER_DECODER = {"model_type": "t5", "is_encoder_decoder": True}


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be spoilt."""
    return shutil.copytree(llama, tmp_path / "model")


def refusals(folder: Path) -> list[str]:
    """The messages of the import and of the service."""
    messages = []
    for read in (
        lambda: import_model(ImportRequest(str(folder), "model")),
        lambda: load_setup_config(folder, name=str(folder)),
    ):
        with pytest.raises(ConfigError) as caught:
            read()
        messages.append(caught.value.message)
    return messages


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ENCODER_DECODER, "is an encoder-decoder (t5), which no engine serves"),
        *(
            ({"quantization_config": {"quant_method": method}}, f"needs the Python package {name}")
            for method, name in QUANTIZERS.items()
        ),
        ({"quantization_config": {"quant_method": "new"}}, "is quantized by new, which is none of"),
        ({"quantization_config": {}}, "is quantized by None"),
        ({"quantization_config": []}, "is quantized by None"),
    ],
)
def test_a_kind_of_model_is_refused_by_both(
    config: dict[str, Any], said: str, folder: Path, store: Path
) -> None:
    edit_json(folder / "config.json", **config)
    first, second = refusals(folder)
    assert first == second
    assert said in first
    assert is_empty(store)


def test_formats_that_transformers_reads_itself_are_not_refused(folder: Path) -> None:
    for method in NATIVE_QUANTIZERS:
        edit_json(folder / "config.json", quantization_config={"quant_method": method})
        assert load_setup_config(folder, name="m")


def test_an_adapter_says_what_to_merge_it_into(tmp_path: Path, store: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.safetensors").touch()
    for message in refusals(folder):
        assert message == (
            f"{folder} has no model, but a LoRA adapter for org/base: merge it into that model "
            "first (peft's merge_and_unload and save_pretrained)"
        )
    assert is_empty(store)


@pytest.mark.usefixtures("store")
def test_an_unknown_type_is_refused_when_it_is_imported(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="newllm")
    with pytest.raises(ConfigError, match=r"is a newllm, which transformers [\d.]+ does not know"):
        import_model(ImportRequest(str(folder), "model"))


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ((), "tokenizer.json is missing: the model has no tokenizer"),
        (("tokenizer.model",), "tokenizer.model alone needs the sentencepiece package"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_both(
    kept: tuple[str, ...], said: str, folder: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    for name in kept:
        (folder / name).touch()
    with pytest.raises(IncompleteModel) as imported:
        import_model(ImportRequest(str(folder), "model"))
    with pytest.raises(IncompleteModel) as loaded:
        load_tokenizer(folder)
    assert imported.value.message == loaded.value.message
    assert said in imported.value.message


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_a_pipeline_that_has_one_variant_only_is_imported_and_loads(
    max_shard_size: str, tmp_path: Path, store: Path
) -> None:
    folder = write_image_model("stable-diffusion", tmp_path / "plain")
    pipeline = df.StableDiffusionPipeline.from_pretrained(folder)
    half = tmp_path / "half"
    pipeline.save_pretrained(half, variant="fp16", max_shard_size=max_shard_size)
    assert not list(half.rglob("model.safetensors"))
    imported = import_model(ImportRequest(str(half), "half"))
    name, _, version = imported.tag.partition(":")
    stored = store / name / version
    config: Any
    config, _ = load_setup_config(stored, name="half")
    assert {path.name for path in half.rglob("*.safetensors*")} == {
        path.name for path in stored.rglob("*.safetensors*")
    }
    assert load_pipeline(config, on_cpu=True, options={})
