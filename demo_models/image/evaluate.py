"""Measures a demo image model: `python -m demo_models.image.evaluate [DIR]`.

Generates images of random scenes and classifies their pixels.
"""

import argparse
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from demo_models.image.build import WEIGHTS
from demo_models.image.classify import likeliest_shape, mismatches
from demo_models.image.world import Scene, random_scene

_BATCH = 16


def generate(
    pipeline: Any, prompts: list[str], *, steps: int, guidance: float
) -> NDArray[np.uint8]:
    """The images (n, 64, 64, 3) of some prompts; image i has the seed i."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    output = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    )
    images: NDArray[np.uint8] = (output.images * 255).round().astype(np.uint8)
    return images


def report(scenes: list[Scene], images: NDArray[np.uint8]) -> None:
    """Prints how many images show their scene, and in what the others differ."""
    errors: Counter[str] = Counter()
    correct = correct_shapes = 0
    for scene, image in zip(scenes, images, strict=True):
        names = mismatches(image, scene)
        errors.update(names)
        correct += not names
        correct_shapes += likeliest_shape(image, scene) == scene.shape.kind
    print(
        f"Correct colours and places: {correct} of {len(scenes)} {dict(errors)}, "
        f"correct shapes: {correct_shapes}"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Measures a demo image model.")
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--count", type=int, default=48, help="number of images")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale")
    parser.add_argument("--sheet", type=Path, help="write all images to this file, as one PNG")
    arguments = parser.parse_args()
    pipeline: Any = StableDiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        arguments.folder, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    rng = random.Random("held out")  # noqa: S311 (a test is no secret)
    scenes = [random_scene(rng) for _ in range(arguments.count)]
    prompts = [scene.prompt(rng) for scene in scenes]
    batches = [
        generate(
            pipeline,
            prompts[start : start + _BATCH],
            steps=arguments.steps,
            guidance=arguments.guidance,
        )
        for start in range(0, len(prompts), _BATCH)
    ]
    report(scenes, np.concatenate(batches))
    if arguments.sheet:
        rows = [np.concatenate(list(images), axis=1) for images in batches if len(images) == _BATCH]
        Image.fromarray(np.concatenate(rows)).save(arguments.sheet)


if __name__ == "__main__":
    main()
