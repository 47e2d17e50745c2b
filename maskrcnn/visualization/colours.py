"""Colours of classes and of instances, told apart as well as their number allows.

Shapes: G objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

Colour = tuple[int, int, int]
ColourBy = Literal["instance", "class"]

# The seven colours of Okabe and Ito, which are colour-blind safe, and three of Paul Tol's.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (153, 221, 255),
    (136, 34, 85),
    (187, 204, 51),
)
IGNORED: Colour = (160, 160, 160)
UNMATCHED: Colour = (255, 0, 40)  # of an object that is missed, or of a detection without an object
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

CLASS_COLOURS = 80  # classes with a colour of their own, as many as COCO has
INSTANCE_COLOURS = 20  # few, so that they differ clearly; only objects that touch need different ones

# From linear RGB to cone responses, and from their cube roots to OKLab (Björn Ottosson,
# https://bottosson.github.io/posts/oklab/). Distances in OKLab are about those that people see.
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_LIGHTNESS = (0.45, 0.9)  # darker or lighter colours are lost on photographs
_LEAST_CHROMA = 0.07  # greys are for ignored regions


def oklab(colours: np.ndarray) -> np.ndarray:
    """Convert sRGB colours (..., 3) in 0..255 to OKLab (..., 3): lightness 0..1, green to red, blue to yellow."""
    value = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _CONES.T) @ _OKLAB.T


@cache
def palette(count: int) -> tuple[Colour, ...]:
    """Return `count` colours: `PALETTE`, then each time the colour that differs most from those before.

    The colours of `IGNORED` and `UNMATCHED` are avoided, too.
    """
    levels = np.arange(0, 256, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    positions = oklab(candidates)
    low, high = _LIGHTNESS
    usable = (positions[:, 0] >= low) & (positions[:, 0] <= high) & (np.hypot(*positions[:, 1:].T) >= _LEAST_CHROMA)
    candidates, positions = candidates[usable], positions[usable]
    chosen = list(PALETTE[:count])
    taken = oklab(np.array([*PALETTE, IGNORED, UNMATCHED]))
    nearest = np.linalg.norm(positions[:, None] - taken, axis=-1).min(axis=1)
    while len(chosen) < count:
        best = int(nearest.argmax())
        red, green, blue = candidates[best].tolist()
        chosen.append((red, green, blue))
        nearest = np.minimum(nearest, np.linalg.norm(positions - positions[best], axis=-1))
    return tuple(chosen)


def class_colour(label: int) -> Colour:
    """Return the colour of a label, 1..K; grey for labels below 1. Colours repeat after `CLASS_COLOURS` classes."""
    return palette(CLASS_COLOURS)[(label - 1) % CLASS_COLOURS] if label > 0 else IGNORED


def instance_colours(boxes: np.ndarray, labels: Sequence[int]) -> list[Colour]:
    """Return a colour for each object, such that objects whose boxes touch have different colours.

    Args:
        boxes: (G, 4).
        labels: G labels; those below 1 are grey.

    Returns:
        G colours. They repeat among objects that are apart, and where more than `INSTANCE_COLOURS` boxes touch.
    """
    choices = palette(INSTANCE_COLOURS)
    used: Counter[int] = Counter()
    chosen = np.full(len(labels), -1)
    for index, label in enumerate(labels):
        if label < 1:
            continue
        x1, y1, x2, y2 = boxes[index]
        earlier = boxes[:index]
        touches = (earlier[:, 0] <= x2) & (earlier[:, 2] >= x1) & (earlier[:, 1] <= y2) & (earlier[:, 3] >= y1)
        near = Counter(chosen[:index][touches].tolist())
        best = min(range(len(choices)), key=lambda choice: (near[choice], used[choice], choice))
        chosen[index] = best
        used[best] += 1
    return [choices[choice] if choice >= 0 else IGNORED for choice in chosen.tolist()]


def object_colours(boxes: np.ndarray, labels: Sequence[int], colour_by: ColourBy) -> list[Colour]:
    """Return the colours of G objects by their class, or by instance; see `instance_colours`."""
    return [class_colour(label) for label in labels] if colour_by == "class" else instance_colours(boxes, labels)


def text_colour(background: Colour) -> Colour:
    """Return black or white, whichever has more contrast to the background (luma of ITU-R BT.601)."""
    red, green, blue = background
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else WHITE
