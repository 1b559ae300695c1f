"""Measures a demo image model: `python -m model_store_scripts.demo_image.evaluate [DIR]`.

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

from model_store_scripts.demo_image.build import WEIGHTS
from model_store_scripts.demo_image.looking import faults, likeliest_kind
from model_store_scripts.demo_image.world import Scene, scene

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


def report(title: str, scenes: list[Scene], pictures: NDArray[np.uint8]) -> None:
    """Prints how many pictures show their scene, and what is wrong with the others."""
    wrong: Counter[str] = Counter()
    right = shapes = right_shapes = 0
    for each, picture in zip(scenes, pictures, strict=True):
        found = faults(picture, each)
        wrong.update(fault.split()[-1] for fault in found)
        right += not found
        shapes += len(each.shapes)
        right_shapes += sum(likeliest_kind(picture, each, s) == s.kind for s in each.shapes)
    print(
        f"{title}: colours and places right in {right} of {len(scenes)} ({dict(wrong)}), "
        f"{right_shapes} of {shapes} shapes"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Measures a demo image model.")
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    parser.add_argument("--count", type=int, default=48, help="number of pictures of either kind")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale")
    parser.add_argument("--sheet", type=Path, help="write the pictures here, as one PNG")
    arguments = parser.parse_args()
    pipeline: Any = StableDiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        arguments.folder, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    rng = random.Random("held out")  # noqa: S311 (a test is no secret)
    rows = []
    for title, shapes in (("One shape", 1), ("Two shapes", 2)):
        scenes: list[Scene] = []
        while len(scenes) < arguments.count:
            scenes += [each for each in [scene(rng)] if len(each.shapes) == shapes]
        prompts = [each.prompt(rng) for each in scenes]
        settings = {"steps": arguments.steps, "guidance": arguments.guidance}
        parts = [
            paint(pipeline, prompts[i : i + _BATCH], **settings)
            for i in range(0, len(prompts), _BATCH)
        ]
        rows += [np.concatenate(list(part), axis=1) for part in parts if len(part) == _BATCH]
        report(title, scenes, np.concatenate(parts))
    if arguments.sheet:
        Image.fromarray(np.concatenate(rows)).save(arguments.sheet)


if __name__ == "__main__":
    main()
