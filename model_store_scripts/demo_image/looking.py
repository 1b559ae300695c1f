"""Looks at the pixels of a picture: which colours are where, and does it show a scene?"""

import itertools

import numpy as np
from numpy.typing import NDArray

from model_store_scripts.demo_image.drawing import SIDE, draw, place_centre
from model_store_scripts.demo_image.world import COLOURS, SHAPES, Scene, Shape

NEAR = 9.0
"""How far the middle of a shape may be from where it was asked for, in pixels."""
_FEWEST_PIXELS = 20
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
    """What is wrong with a picture (64, 64, 3) of a scene: background, colours, places."""
    names = nearest_colours(picture)
    found = []
    edge = np.concatenate([names[0], names[-1], names[:, 0], names[:, -1]])
    if np.mean(edge == _NAMES.index(scene.background)) < 0.6:
        found.append("background")
    for shape in scene.shapes:
        ys, xs = np.nonzero(_around(shape) & (names == _NAMES.index(shape.colour)))
        if len(ys) < _FEWEST_PIXELS:
            found.append(f"no {shape.colour} there")
            continue
        x, y = place_centre(shape.place)
        if np.hypot(xs.mean() + 0.5 - x, ys.mean() + 0.5 - y) > NEAR:
            found.append(f"{shape.colour} elsewhere")
    return found


def likeliest_kind(picture: NDArray[np.uint8], scene: Scene, shape: Shape) -> str:
    """Which of `SHAPES` the pixels of a shape's colour look most like."""
    seen = _around(shape) & (nearest_colours(picture) == _NAMES.index(shape.colour))

    def likeness(kind: str) -> float:
        alone = Shape(kind, "black", shape.size, shape.place)
        dark = draw(Scene((alone,)))[..., 0] < 0.5
        shifts = itertools.product(range(-_SHIFT, _SHIFT + 1), repeat=2)
        return max(_overlap(seen, np.roll(dark, shift, axis=(0, 1))) for shift in shifts)

    return max(SHAPES, key=likeness)


def _around(shape: Shape) -> NDArray[np.bool_]:
    """The part of the picture nearer to the shape's place than to the opposite one."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    centre_x, centre_y = place_centre(shape.place)
    near: NDArray[np.bool_] = np.hypot(x - centre_x, y - centre_y) < SIDE / 3
    return near


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))
