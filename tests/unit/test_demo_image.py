"""The demo image model paints what the prompt says; what looks at it is not easily pleased."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo_models.image.build import write_demo_image_model
from demo_models.image.drawing import draw
from demo_models.image.evaluate import paint
from demo_models.image.looking import faults, likeliest_kind
from demo_models.image.world import SHAPES, Scene, Shape, scene

MEGABYTE = 1_000_000
LEFT, RIGHT, TOP, BOTTOM, MIDDLE = (0, 1), (2, 1), (1, 0), (1, 2), (1, 1)
PAINTED = {
    "a red circle on the left": Scene(Shape("circle", "red", place=LEFT)),
    "a large blue square on the right": Scene(Shape("square", "blue", "large", RIGHT)),
    "a green triangle at the bottom": Scene(Shape("triangle", "green", place=BOTTOM)),
    "a yellow circle at the top on a blue background": Scene(
        Shape("circle", "yellow", place=TOP), "blue"
    ),
    "a purple square": Scene(Shape("square", "purple", place=MIDDLE)),
    "a black diamond on the left": Scene(Shape("diamond", "black", place=LEFT)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_image_model(tmp_path_factory.mktemp("models") / "demo-image")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """Loaded as anybody would load it, with nothing of ours."""
    from diffusers import DiffusionPipeline

    loaded: Any = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def as_bytes(drawn: Any) -> Any:
    return (drawn * 255).round().astype(np.uint8)


def test_it_is_small_and_whole(folder: Path, pipeline: Any) -> None:
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 10 * MEGABYTE
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}


def test_it_paints_what_the_prompt_says(pipeline: Any) -> None:
    prompts = [*PAINTED, *PAINTED]  # each with two seeds
    pictures = paint(pipeline, prompts, steps=20, guidance=4.0)
    assert pictures.shape == (len(prompts), 64, 64, 3)
    wrong = {
        f"{prompt} (seed {seed})": found
        for seed, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True))
        if (found := faults(picture, PAINTED[prompt]))
    }
    assert wrong == {}


def test_what_is_drawn_is_right_and_anything_else_wrong() -> None:
    rng = random.Random(0)
    for _ in range(60):
        wanted = scene(rng)
        drawn = as_bytes(draw(wanted, rng))
        assert faults(drawn, wanted) == []
        assert likeliest_kind(drawn, wanted) == wanted.shape.kind
    red = Scene(Shape("circle", "red", place=LEFT))
    for other in (
        Scene(Shape("circle", "blue", place=LEFT)),
        Scene(Shape("circle", "red", place=RIGHT)),
        Scene(Shape("circle", "red", place=(0, 0))),
        Scene(Shape("circle", "red", place=LEFT), "green"),
        Scene(Shape("circle", "white", place=LEFT)),
    ):
        assert faults(as_bytes(draw(other, rng)), red) != []


def test_every_prompt_fits_the_tokenizer(pipeline: Any) -> None:
    rng = random.Random(1)
    longest = max(len(pipeline.tokenizer(scene(rng).prompt(rng)).input_ids) for _ in range(2000))
    assert longest <= pipeline.tokenizer.model_max_length
    words = {word for kind in SHAPES for word in pipeline.tokenizer.tokenize(kind)}
    assert words == {f"{kind}</w>" for kind in SHAPES}
    # Any text can be read, whatever it holds.
    assert (
        pipeline.tokenizer.unk_token_id not in pipeline.tokenizer("zebra Ä 日本 🦊").input_ids[1:-1]
    )
