"""Classifies the pixels of an image: does it show a scene, and which shape?

Called by `evaluate` and the tests.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from demo_models.image.drawing import draw, place_centre
from demo_models.image.world import COLOURS, SHAPES, Scene, Shape

MAX_OFFSET = 9.0
"""The largest distance of a shape's centre from the centre of its place, in pixels."""
_MIN_PIXELS = 20
_MIN_EDGE_SHARE = 0.6
_SHIFT = 3
_NAMES = list(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)

ColourIndices = NDArray[np.int64]


def nearest_colours(image: NDArray[np.uint8]) -> ColourIndices:
    """For pixels (height, width, 3): the index of each one's nearest colour in `COLOURS`."""
    distances = np.linalg.norm(image[..., None, :].astype(np.float32) - _PALETTE, axis=-1)
    indices: ColourIndices = distances.argmin(axis=-1)
    return indices


def mismatches(image: NDArray[np.uint8], scene: Scene) -> list[str]:
    """In what an image (64, 64, 3) differs from a scene: background, colour, place."""
    colours = nearest_colours(image)
    edge = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    names = []
    if np.mean(edge == _NAMES.index(scene.background)) < _MIN_EDGE_SHARE:
        names.append("background")
    ys, xs = np.nonzero(colours == _NAMES.index(scene.shape.colour))
    if len(ys) < _MIN_PIXELS:
        return [*names, "colour"]
    x, y = place_centre(scene.shape.place)
    if np.hypot(xs.mean() + 0.5 - x, ys.mean() + 0.5 - y) > MAX_OFFSET:
        names.append("place")
    return names


def likeliest_shape(image: NDArray[np.uint8], scene: Scene) -> str:
    """Which of `SHAPES` the pixels of the shape's colour are most similar to."""
    shape = scene.shape
    mask = nearest_colours(image) == _NAMES.index(shape.colour)

    def similarity(name: str) -> float:
        black = Shape(name, "black", shape.size, shape.place)
        reference = draw(Scene(black))[..., 0] < 0.5
        shifts = itertools.product(range(-_SHIFT, _SHIFT + 1), repeat=2)
        return max(_overlap(mask, np.roll(reference, shift, axis=(0, 1))) for shift in shifts)

    return max(SHAPES, key=similarity)


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((a & b).sum() / max(1, (a | b).sum()))
