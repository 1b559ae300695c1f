"""The demo image model generates what the prompt says, and the classifier notices if not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo_models.image.build import write_demo_image_model
from demo_models.image.classify import likeliest_shape, mismatches
from demo_models.image.drawing import draw
from demo_models.image.evaluate import generate
from demo_models.image.world import SHAPES, Scene, Shape, random_scene

MEGABYTE = 1_000_000
LEFT, RIGHT, TOP, BOTTOM, MIDDLE = (0, 1), (2, 1), (1, 0), (1, 2), (1, 1)
SCENES = {
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
    """Loaded with diffusers alone."""
    from diffusers import DiffusionPipeline

    loaded: Any = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def as_bytes(image: Any) -> Any:
    return (image * 255).round().astype(np.uint8)


def test_it_is_small_and_complete(folder: Path, pipeline: Any) -> None:
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 10 * MEGABYTE
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}


def test_it_generates_what_the_prompt_says(pipeline: Any) -> None:
    prompts = [*SCENES, *SCENES]  # each with two seeds
    images = generate(pipeline, prompts, steps=20, guidance=4.0)
    assert images.shape == (len(prompts), 64, 64, 3)
    errors = {
        f"{prompt} (seed {seed})": names
        for seed, (prompt, image) in enumerate(zip(prompts, images, strict=True))
        if (names := mismatches(image, SCENES[prompt]))
    }
    assert errors == {}


def test_only_a_drawing_of_the_same_scene_matches() -> None:
    rng = random.Random(0)
    for _ in range(60):
        scene = random_scene(rng)
        image = as_bytes(draw(scene, rng))
        assert mismatches(image, scene) == []
        assert likeliest_shape(image, scene) == scene.shape.kind
    red = Scene(Shape("circle", "red", place=LEFT))
    for other in (
        Scene(Shape("circle", "blue", place=LEFT)),
        Scene(Shape("circle", "red", place=RIGHT)),
        Scene(Shape("circle", "red", place=(0, 0))),
        Scene(Shape("circle", "red", place=LEFT), "green"),
        Scene(Shape("circle", "white", place=LEFT)),
    ):
        assert mismatches(as_bytes(draw(other, rng)), red) != []


def test_every_prompt_fits_the_tokenizer(pipeline: Any) -> None:
    rng = random.Random(1)
    longest = max(
        len(pipeline.tokenizer(random_scene(rng).prompt(rng)).input_ids) for _ in range(2000)
    )
    assert longest <= pipeline.tokenizer.model_max_length
    words = {word for shape in SHAPES for word in pipeline.tokenizer.tokenize(shape)}
    assert words == {f"{shape}</w>" for shape in SHAPES}
    # Every text can be tokenized.
    assert (
        pipeline.tokenizer.unk_token_id not in pipeline.tokenizer("zebra Ä 日本 🦊").input_ids[1:-1]
    )
