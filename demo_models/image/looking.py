"""Looks at the pixels of a picture: which colours are where, and does it show a scene?"""

import itertools

import numpy as np
from numpy.typing import NDArray

from demo_models.image.drawing import draw, place_centre
from demo_models.image.world import COLOURS, SHAPES, Scene, Shape

NEAR = 9.0
"""How far the middle of a shape may be from where it was asked for, in pixels."""
_FEWEST_PIXELS = 20
_MOST_OF_THE_EDGE = 0.6
_SHIFT = 3
_NAMES = list(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)

Names = NDArray[np.int64]


def nearest_colours(picture: NDArray[np.uint8]) -> Names:
    """For pixels (height, width, 3): the index of each one's nearest colour in `COLOURS`."""
    distances = np.linalg.norm(picture[..., None, :].astype(np.float32) - _PALETTE, axis=-1)
    nearest: Names = distances.argmin(axis=-1)
    return nearest


def faults(picture: NDArray[np.uint8], scene: Scene) -> list[str]:
    """What is wrong with a picture (64, 64, 3) of a scene: background, colour, place."""
    names = nearest_colours(picture)
    edge = np.concatenate([names[0], names[-1], names[:, 0], names[:, -1]])
    found = []
    if np.mean(edge == _NAMES.index(scene.background)) < _MOST_OF_THE_EDGE:
        found.append("background")
    ys, xs = np.nonzero(names == _NAMES.index(scene.shape.colour))
    if len(ys) < _FEWEST_PIXELS:
        return [*found, "colour"]
    x, y = place_centre(scene.shape.place)
    if np.hypot(xs.mean() + 0.5 - x, ys.mean() + 0.5 - y) > NEAR:
        found.append("place")
    return found


def likeliest_kind(picture: NDArray[np.uint8], scene: Scene) -> str:
    """Which of `SHAPES` the pixels of the shape's colour look most like."""
    shape = scene.shape
    seen = nearest_colours(picture) == _NAMES.index(shape.colour)

    def likeness(kind: str) -> float:
        alone = Shape(kind, "black", shape.size, shape.place)
        dark = draw(Scene(alone))[..., 0] < 0.5
        shifts = itertools.product(range(-_SHIFT, _SHIFT + 1), repeat=2)
        return max(_overlap(seen, np.roll(dark, shift, axis=(0, 1))) for shift in shifts)

    return max(SHAPES, key=likeness)


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))
