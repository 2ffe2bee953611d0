"""What there is in the embedded corpus's world: things, scenes, and how a scene is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (247, 140, 24),
    "yellow": (246, 214, 50),
    "green": (44, 160, 60),
    "turquoise": (52, 203, 203),
    "blue": (38, 84, 214),
    "purple": (126, 58, 180),
    "pink": (244, 120, 188),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
ROWS = ("top", "bottom")
COLUMNS = ("left", "right")

# All (colour, shape) pairs, and those that no training scene shows: each colour and each shape is seen with others.
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = tuple((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


class Thing(NamedTuple):
    """One object, in a cell of a two by two grid."""

    size: str
    colour: str
    shape: str
    row: int  # 0 top, 1 bottom
    column: int  # 0 left, 1 right

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return (self.colour, self.shape)

    @property
    def place(self) -> str:
        """Row and column in words."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """One to three things in different cells, no two of one colour and shape; in reading order.

    Args:
        things: what it shows.
        seed: fixes what no caption tells: background, noise, exact places and sizes.
    """

    things: tuple[Thing, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.things, key=lambda thing: (thing.row, thing.column)))
        object.__setattr__(self, "things", ordered)
        if len({thing.place for thing in ordered}) != len(ordered) or not ordered:
            raise ValueError("a scene holds one to four things, each in a cell of its own")

    @property
    def description(self) -> tuple[Thing, ...]:
        """All that a full caption tells: equal for two scenes exactly if every caption of one fits the other."""
        return self.things

    @property
    def main(self) -> Thing:
        """The thing that the picture is of: the first large one, else the first."""
        return next((thing for thing in self.things if thing.size == "large"), self.things[0])


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw a scene, uint8 [size, size, 3]; the same scene and size always give the same picture."""
    rng = np.random.default_rng((scene.seed, 7))
    fine = 3  # supersampling, for smooth edges
    cell = size * fine / 2
    shade = rng.uniform(24, 78) if rng.random() < 0.5 else rng.uniform(196, 240)
    tint = shade + rng.uniform(-8, 8, size=3)
    image = Image.new("RGB", (size * fine, size * fine), tuple(int(value) for value in tint))
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        radius = cell * (rng.uniform(0.38, 0.44) if thing.size == "large" else rng.uniform(0.19, 0.24))
        slack = (cell / 2 - radius) * 0.5
        x = (thing.column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (thing.row + 0.5) * cell + rng.uniform(-slack, slack)
        base = np.asarray(COLOURS[thing.colour]) + rng.uniform(-10, 10, size=3)
        red, green, blue = (int(value) for value in np.clip(base, 0, 255))
        _draw_shape(draw, thing.shape, x, y, radius, (red, green, blue))
    pixels = np.asarray(image.reduce(fine), dtype=np.int16)
    grain = rng.integers(-6, 7, size=(size, size, 1), dtype=np.int16)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, int, int]
) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "ring":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=round(radius * 0.42))
    else:
        draw.polygon([(x + dx * radius, y + dy * radius) for dx, dy in _OUTLINES[shape]], fill=colour)


def _star_outline() -> list[tuple[float, float]]:
    radii = (1.08, 0.46)
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(radii[i % 2] * math.cos(angle), radii[i % 2] * math.sin(angle)) for i, angle in enumerate(angles)]


_ARM = 0.34
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    "star": _star_outline(),
    "cross": [
        (-_ARM, -1.0),
        (_ARM, -1.0),
        (_ARM, -_ARM),
        (1.0, -_ARM),
        (1.0, _ARM),
        (_ARM, _ARM),
        (_ARM, 1.0),
        (-_ARM, 1.0),
        (-_ARM, _ARM),
        (-1.0, _ARM),
        (-1.0, -_ARM),
        (-_ARM, -_ARM),
    ],
}
