"""Draws a scene as an array of pixels, with smooth edges, from the distance functions of shapes.

Called by the training, and by `classify` to compare shapes.
"""

import random

import numpy as np
from numpy.typing import NDArray

from demo_models.image.world import COLOURS, SIZES, Scene, Shape

SIDE = 64
"""Width and height of an image in pixels."""
JITTER = 1.5
"""The largest random offset of a shape from the centre of its place, in pixels per axis."""

Pixels = NDArray[np.float32]
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def place_centre(place: tuple[int, int]) -> tuple[float, float]:
    """The centre of a place (column, row) as (x, y) in pixels."""
    column, row = place
    return SIDE * (0.24 + 0.26 * column), SIDE * (0.24 + 0.26 * row)


def draw(scene: Scene, rng: random.Random | None = None) -> Pixels:
    """The image as (SIDE, SIDE, 3) from 0 to 1; `rng` moves the shape by up to `JITTER`."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = _rgb(scene.background)
    coverage = np.clip(0.5 - _distance(scene.shape, rng), 0.0, 1.0)[..., None]
    image += coverage * (_rgb(scene.shape.colour) - image)
    return image


def _rgb(colour: str) -> Pixels:
    return np.array(COLOURS[colour], np.float32) / np.float32(255)


def _distance(shape: Shape, rng: random.Random | None) -> Pixels:
    """The approximate distance of each pixel from the shape in pixels, negative inside."""
    centre_x, centre_y = place_centre(shape.place)
    x, y = _X - centre_x, _Y - centre_y
    if rng is not None:
        x, y = x - rng.uniform(-JITTER, JITTER), y - rng.uniform(-JITTER, JITTER)
    r = SIZES[shape.size]
    match shape.kind:
        case "circle":
            distance = np.hypot(x, y) - r
        case "ring":
            distance = np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
        case "square":
            distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * r
        case "diamond":
            distance = (np.abs(x) + np.abs(y) - 1.15 * r) / np.sqrt(2.0)
        case "cross":
            bar = np.maximum(np.abs(x) - r, np.abs(y) - 0.32 * r)
            distance = np.minimum(bar, np.maximum(np.abs(y) - r, np.abs(x) - 0.32 * r))
        case "triangle":
            side = (2.0 * np.abs(x) - y - r) / np.sqrt(5.0)
            distance = np.maximum(side, y - r)
        case unknown:
            raise ValueError(f"unknown shape {unknown}")
    smooth: Pixels = distance.astype(np.float32)
    return smooth
