"""Captions of objects, at places where they hide neither each other nor small objects.

Shapes: G objects, C candidate places of a caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw, ImageFont

from maskrcnn.visualization.colours import Colour, text_colour

FONT_SIZE = 11  # pixels, the smallest of a caption
FONT_PART = 75  # a caption is 1 / 75 of the longer side of a picture, but at least `FONT_SIZE`
SMALLER = 0.7  # size of a caption that has no room otherwise
FREE = 0.05  # largest part of an object that a caption may hide without a search for another place
MOST_HIDDEN = 0.25  # if every place hides a larger part of an object, the caption is left out

Rectangle = tuple[float, float, float, float]


class Caption(NamedTuple):
    """A text at a place of a picture."""

    text: str
    rectangle: Rectangle
    font_size: int


def font_size_of(size: tuple[int, int]) -> int:
    """Return the size of captions in a picture of this width and height."""
    return max(FONT_SIZE, round(max(size) / FONT_PART))


@lru_cache(maxsize=64)
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of Pillow with this size in pixels."""
    return ImageFont.load_default(size=size)


def place_captions(texts: Sequence[str], boxes: np.ndarray, size: tuple[int, int]) -> list[Caption | None]:
    """Find a place for each caption near its box; the first ones choose first.

    A caption overlaps no other one. It is above, below, beside or inside its box, where it hides the smallest part of
    any box. It is smaller, or None, if there is no room.

    Args:
        texts: G captions.
        boxes: (G, 4).
        size: width and height of the picture.
    """
    full = font_size_of(size)
    sizes = [full, *([round(SMALLER * full)] if round(SMALLER * full) >= FONT_SIZE else [])]
    taken: list[Rectangle] = []
    captions: list[Caption | None] = []
    for text, box in zip(texts, boxes.tolist(), strict=True):
        found = (_place(text, box, boxes, taken, size, font_size) for font_size in sizes)
        caption = next((caption for caption in found if caption is not None), None)
        captions.append(caption)
        taken += [caption.rectangle] if caption else []
    return captions


def _place(
    text: str, box: Rectangle, boxes: np.ndarray, taken: list[Rectangle], size: tuple[int, int], font_size: int
) -> Caption | None:
    """Return the caption at its best place, or None if all places hide another caption or too much of an object."""
    width, height = font_of(font_size).getbbox(text)[2] + 2 * _padding(font_size), round(1.27 * font_size)
    places = np.array(list(dict.fromkeys(_places(box, width, height, size))))  # (C, 4)
    if taken:
        places = places[overlaps(places, np.array(taken)).sum(axis=1) == 0]
    if not len(places):
        return None
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    hidden = (overlaps(places, boxes) / np.maximum(areas, 1)).max(axis=1)
    best = int(np.argmax(hidden <= FREE)) if (hidden <= FREE).any() else int(hidden.argmin())
    if hidden[best] > MOST_HIDDEN:
        return None
    x1, y1, x2, y2 = places[best].tolist()
    return Caption(text, (x1, y1, x2, y2), font_size)


def draw_caption(draw: ImageDraw.ImageDraw, caption: Caption, colour: Colour) -> None:
    """Draw a caption on a background of this colour."""
    x1, y1, x2, y2 = caption.rectangle
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
    position = (x1 + _padding(caption.font_size), y1 + (y2 - y1) // 2)
    draw.text(position, caption.text, fill=text_colour(colour), font=font_of(caption.font_size), anchor="lm")


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection areas of all pairs of rectangles: (C, 4), (G, 4) -> (C, G)."""
    width = np.minimum(first[:, None, 2], second[:, 2]) - np.maximum(first[:, None, 0], second[:, 0])
    height = np.minimum(first[:, None, 3], second[:, 3]) - np.maximum(first[:, None, 1], second[:, 1])
    return width.clip(0) * height.clip(0)


def _padding(font_size: int) -> int:
    return max(2, font_size // 5)


def _places(box: Rectangle, width: float, height: float, size: tuple[int, int]) -> Iterator[Rectangle]:
    """Yield places for a caption, best first: above, below, inside, then beside the box; all inside the picture."""
    x1, y1, x2, y2 = box
    corners = [(x, y) for y in (y1 - height, y2, y1, y2 - height) for x in (x1, x2 - width)]
    corners += [(x, y) for x in (x2, x1 - width) for y in (y1, y2 - height)]
    for x, y in corners:
        x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
        yield x, y, x + width, y + height
