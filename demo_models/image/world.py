"""The world of the demo image model: one flat shape on a background, and prompts for it."""

import random
from dataclasses import dataclass

COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 20),
    "green": (30, 160, 50),
    "blue": (30, 70, 220),
    "purple": (130, 30, 170),
    "pink": (255, 150, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
"""Colours by name, as RGB from 0 to 255."""
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
SIZES = {"small": 6.0, "": 10.0, "large": 14.0}
"""Half the width in pixels by name; the empty name is the size if the prompt names none."""
PLACES = {
    (0, 0): ("in the top left corner", "at the top left", "in the upper left"),
    (1, 0): ("at the top", "on top"),
    (2, 0): ("in the top right corner", "at the top right", "in the upper right"),
    (0, 1): ("on the left", "on the left side", "at the left"),
    (1, 1): ("", "", "in the middle", "in the center", "in the centre"),
    (2, 1): ("on the right", "on the right side", "at the right"),
    (0, 2): ("in the bottom left corner", "at the bottom left", "in the lower left"),
    (1, 2): ("at the bottom", "below"),
    (2, 2): ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
"""Phrases by column and row, in thirds of the image; no phrase means the centre."""
BACKGROUND = "white"
"""The background if the prompt names none."""

_OPENINGS = ("", "", "", "a picture of ", "an image of ", "a painting of ", "draw ", "paint ")
_BACKGROUND_PHRASES = ("on a {} background", "on {}", "in front of a {} background")
_BACKGROUND_SHARE = 0.3


@dataclass(frozen=True)
class Shape:
    """One shape: names from `SHAPES`, `COLOURS` and `SIZES`, and a place from `PLACES`."""

    kind: str
    colour: str
    size: str = ""
    place: tuple[int, int] = (1, 1)

    def phrase(self, rng: random.Random) -> str:
        """A random phrase for the shape."""
        size = rng.choice(("large", "big")) if self.size == "large" else self.size
        words = [word for word in (size, self.colour, self.kind) if word]
        article = "an" if words[0][0] in "aeiou" else "a"
        where = rng.choice(PLACES[self.place])
        return " ".join([article, *words, *([where] if where else [])])


@dataclass(frozen=True)
class Scene:
    """The content of an image."""

    shape: Shape
    background: str = BACKGROUND

    def prompt(self, rng: random.Random) -> str:
        """A random prompt for the scene."""
        text = self.shape.phrase(rng)
        if self.background != BACKGROUND or rng.random() < 0.2:
            text = f"{text} {rng.choice(_BACKGROUND_PHRASES).format(self.background)}"
        text = rng.choice(_OPENINGS) + text
        return rng.choice((text, text, text.capitalize(), text + "."))


def random_scene(rng: random.Random) -> Scene:
    """A random scene; the shape differs in colour from the background."""
    background = BACKGROUND
    if rng.random() < _BACKGROUND_SHARE:
        background = rng.choice(list(COLOURS))
    colours = [name for name in COLOURS if name != background]
    sizes = ("", "", *SIZES)
    place = rng.choice(list(PLACES))
    shape = Shape(rng.choice(SHAPES), rng.choice(colours), rng.choice(sizes), place)
    return Scene(shape, background)
