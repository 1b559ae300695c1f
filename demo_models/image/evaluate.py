"""Measures a demo image model: `python -m demo_models.image.evaluate [DIR]`.

Paints scenes it never learnt word for word and looks at the pixels.
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
from demo_models.image.looking import faults, likeliest_kind
from demo_models.image.world import Scene, scene

_BATCH = 16


def paint(pipeline: Any, prompts: list[str], *, steps: int, guidance: float) -> NDArray[np.uint8]:
    """The pictures (n, 64, 64, 3) of some prompts; picture i has the seed i."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    output = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    )
    pictures: NDArray[np.uint8] = (output.images * 255).round().astype(np.uint8)
    return pictures


def report(scenes: list[Scene], pictures: NDArray[np.uint8]) -> None:
    """Prints how many pictures show their scene, and what is wrong with the others."""
    wrong: Counter[str] = Counter()
    right = right_shapes = 0
    for each, picture in zip(scenes, pictures, strict=True):
        found = faults(picture, each)
        wrong.update(found)
        right += not found
        right_shapes += likeliest_kind(picture, each) == each.shape.kind
    print(
        f"Colours and places right in {right} of {len(scenes)} {dict(wrong)}, "
        f"shapes in {right_shapes}"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Measures a demo image model.")
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--count", type=int, default=48, help="number of pictures")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale")
    parser.add_argument("--sheet", type=Path, help="write the pictures here, as one PNG")
    arguments = parser.parse_args()
    pipeline: Any = StableDiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        arguments.folder, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    rng = random.Random("held out")  # noqa: S311 (a test is no secret)
    scenes = [scene(rng) for _ in range(arguments.count)]
    prompts = [each.prompt(rng) for each in scenes]
    parts = [
        paint(
            pipeline,
            prompts[start : start + _BATCH],
            steps=arguments.steps,
            guidance=arguments.guidance,
        )
        for start in range(0, len(prompts), _BATCH)
    ]
    report(scenes, np.concatenate(parts))
    if arguments.sheet:
        rows = [np.concatenate(list(part), axis=1) for part in parts if len(part) == _BATCH]
        Image.fromarray(np.concatenate(rows)).save(arguments.sheet)


if __name__ == "__main__":
    main()
