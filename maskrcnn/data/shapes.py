"""Generated scenes: images with labelled objects, drawn on the fly from a seed.

A scene depends on the dataset's seed and its own index alone, and is the same, bit for bit, on every machine. To
that end all arithmetic here consists of single additions, multiplications, divisions, square roots, roundings and
comparisons, which IEEE 754 defines to the last bit. There is no sine, no exponential, no matrix product and no sum
over an array of floats, because libraries round these differently from one processor to the next.

Shapes: H, W image height and width; h, w the same of a window; K classes.

Coordinates are continuous: the pixel in row i and column j has its centre at (j + 0.5, i + 0.5), and belongs to an
object if that centre lies inside. In an object's own frame, u runs along its longer half extent a, and v along b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from pycocotools import mask as rle
from pydantic import Field, field_validator

from maskrcnn.config import Section
from maskrcnn.structures import ClassTable, Example, MaskCrop

Array = np.ndarray
ShapeName = Literal["disc", "ring", "rectangle", "frame", "triangle", "cross", "star", "crescent"]

ASPECTS = (0.5, 1.0)  # b / a of objects; thinner ones would be hard to tell from the strokes in the background
MIN_VISIBLE_SHARE = 0.4  # of an object's pixels that the objects before it may not hide
MIN_VISIBLE_PIXELS = 16
STROKES = (2, 6)  # lines in the background, which belong to no class
BYTE_PAIR_STD = 104.5  # standard deviation of the sum of two uniform bytes


# How deep a point lies inside each shape, in pixels; negative outside. Exact on straight edges, first-order on curves.


def _ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    p, q = u / a, v / b
    # The implicit function 1 - p^2 - q^2 over the length of its gradient; the constant only avoids 0 / 0 at the centre.
    return (1.0 - p * p - q * q) / (2.0 * np.sqrt((p / a) * (p / a) + (q / b) * (q / b)) + 1e-9)


def _ring(u: Array, v: Array, a: float, b: float) -> Array:
    return np.minimum(_ellipse(u, v, a, b), -_ellipse(u, v, 0.55 * a, 0.55 * b))


def _rectangle(u: Array, v: Array, a: float, b: float) -> Array:
    return np.minimum(a - np.abs(u), b - np.abs(v))


def _frame(u: Array, v: Array, a: float, b: float) -> Array:
    depth = _rectangle(u, v, a, b)
    return np.minimum(depth, 0.45 * b - depth)


def _triangle(u: Array, v: Array, a: float, b: float) -> Array:
    # Isosceles, the tip at (a, 0) and the base from (-a, -b) to (-a, b).
    side = (a * b - b * u - 2.0 * a * np.abs(v)) / math.sqrt(b * b + 4.0 * a * a)
    return np.minimum(side, a + u)


def _cross(u: Array, v: Array, a: float, b: float) -> Array:
    thin = 0.28 * b
    return np.maximum(_rectangle(u, v, a, thin), _rectangle(u, v, thin, b))


# Cosines and sines of 0, 72, 144, 216 and 288 degrees: the directions of the five lines of a pentagram.
PENTAGRAM = (
    (1.0, 0.0),
    (0.30901699437494745, 0.9510565162951535),
    (-0.8090169943749475, 0.5877852522924731),
    (-0.8090169943749475, -0.5877852522924731),
    (0.30901699437494745, -0.9510565162951535),
)


def _star(u: Array, v: Array, a: float, b: float) -> Array:
    # A point is in the pentagram if it is on the inner side of at least four of its five lines: the second smallest
    # of the five depths says so.
    smallest = second = np.full_like(u, np.inf)
    for nx, ny in PENTAGRAM:
        nu, nv = nx / a, ny / b
        depth = (PENTAGRAM[1][0] - u * nu - v * nv) / math.sqrt(nu * nu + nv * nv)
        second = np.minimum(second, np.maximum(smallest, depth))
        smallest = np.minimum(smallest, depth)
    return second


def _crescent(u: Array, v: Array, a: float, b: float) -> Array:
    return np.minimum(_ellipse(u, v, a, b), -_ellipse(u - 0.5 * a, v, 0.8 * a, 0.8 * b))


def _stroke(u: Array, v: Array, a: float, b: float) -> Array:
    beyond = np.maximum(np.abs(u) - (a - b), 0.0)
    return b - np.sqrt(beyond * beyond + v * v)


Depth = Callable[[Array, Array, float, float], Array]

SHAPES: Mapping[ShapeName, Depth] = {
    "disc": _ellipse,
    "ring": _ring,
    "rectangle": _rectangle,
    "frame": _frame,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
}


# Random numbers. Only Generator.random and .bytes are used: `uniform` and `normal` may round differently by machine.


def _between(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _count(rng: Generator, low: int, high: int) -> int:
    """Return a whole number from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    """Draw with density 1/x by rejection, which needs no logarithm."""
    while True:
        value = _between(rng, low, high)
        if rng.random() * value < low:
            return value


def _direction(rng: Generator) -> tuple[float, float]:
    """Return the cosine and sine of a uniform angle: a point of the unit disc, divided by its length."""
    while True:
        x, y = _between(rng, -1.0, 1.0), _between(rng, -1.0, 1.0)
        squared = x * x + y * y
        if 1e-4 < squared < 1.0:
            length = math.sqrt(squared)
            return x / length, y / length


class Colour(NamedTuple):
    """Red, green and blue, 0..255."""

    red: float
    green: float
    blue: float

    def distance(self, other: Colour) -> float:
        """Return the mean absolute difference of the channels, as a share of the full range."""
        return (abs(self.red - other.red) + abs(self.green - other.green) + abs(self.blue - other.blue)) / 765.0

    def mixed(self, other: Colour, share: float) -> Colour:
        """Return the colour that lies `share` of the way to `other`."""
        return Colour(*(mine + share * (its - mine) for mine, its in zip(self, other, strict=True)))


BLACK = Colour(0.0, 0.0, 0.0)
WHITE = Colour(255.0, 255.0, 255.0)


def _colour(rng: Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    """Draw a colour of any hue; saturation and value (of HSV) come from the given ranges."""
    hue = 6.0 * rng.random()
    chroma = _between(rng, *saturation)
    brightest = 255.0 * _between(rng, *value)
    wheel = ((offset + hue) % 6.0 for offset in (5.0, 3.0, 1.0))
    return Colour(*(brightest * (1.0 - chroma * max(0.0, min(k, 4.0 - k, 1.0))) for k in wheel))


def _contrasting(rng: Generator, others: list[Colour], contrast: float) -> Colour:
    """Draw vivid colours and take the first that differs from all others by `contrast`, else the best."""

    def gap(colour: Colour) -> float:
        return min(colour.distance(other) for other in others)

    attempts = [_colour(rng, saturation=(0.3, 0.95), value=(0.3, 1.0)) for _ in range(12)]
    return next((colour for colour in attempts if gap(colour) >= contrast), max(attempts, key=gap))


# Textures: (h, w) float32 from 0 to 1.


def _stretched(values: Array, length: int) -> Array:
    """Interpolate linearly along axis 0, from however many knots there are to `length` values."""
    position = (np.arange(length) + 0.5) * (len(values) - 1) / length
    knot = position.astype(np.int64)
    share = (position - knot).astype(np.float32)[:, None]
    return values[knot] + share * (values[knot + 1] - values[knot])


def _waves(rng: Generator, height: int, width: int, period: float) -> Array:
    """Draw parallel stripes of a random direction, whose brightness goes up and down linearly."""
    cos, sin = _direction(rng)
    across = (np.arange(width) * (cos / period)).astype(np.float32)
    down = (np.arange(height) * (sin / period) + rng.random()).astype(np.float32)
    phase = across + down[:, None]
    return np.abs(2.0 * (phase - np.floor(phase)) - 1.0)


def _texture(rng: Generator, height: int, width: int) -> Array:
    """Mix a slow gradient, stripes and smooth noise in random shares."""
    gradient = _waves(rng, height, width, period=_between(rng, 1.5, 3.0) * max(height, width))
    stripes = _waves(rng, height, width, period=_between(rng, 4.0, 24.0))
    knots = rng.random((5, 5)).astype(np.float32)
    noise = _stretched(_stretched(knots, height).T, width).T
    shares = [0.2 + rng.random() for _ in range(3)]
    total = shares[0] + shares[1] + shares[2]
    return gradient * (shares[0] / total) + stripes * (shares[1] * 0.6 / total) + noise * (shares[2] / total)


class Window(NamedTuple):
    """The part of the image around one shape, and how deep its pixel centres lie inside it."""

    rows: slice
    columns: slice
    depth: Array  # (h, w) float64, pixels


def _window(
    shape: Depth, centre: tuple[float, float], angle: tuple[float, float], extents: tuple[float, float],
    image_size: tuple[int, int],
) -> Window:  # fmt: skip
    """Evaluate a shape where it can be seen.

    `centre` is (x, y) in pixels, inside the image; `angle` is the cosine and sine; `extents` are a and b, in pixels.
    """
    (x, y), (cos, sin), (a, b), (height, width) = centre, angle, extents, image_size
    reach_x = abs(cos) * a + abs(sin) * b + 1.0  # one pixel more, for the soft edge
    reach_y = abs(sin) * a + abs(cos) * b + 1.0
    rows = slice(max(0, math.floor(y - reach_y)), min(height, math.ceil(y + reach_y)))
    columns = slice(max(0, math.floor(x - reach_x)), min(width, math.ceil(x + reach_x)))
    dx = np.arange(columns.start, columns.stop) + (0.5 - x)
    dy = (np.arange(rows.start, rows.stop) + (0.5 - y))[:, None]
    return Window(rows, columns, shape(dx * cos + dy * sin, dy * cos - dx * sin, a, b))


def _blend(canvas: Array, window: Window, low: Colour, high: Colour, texture: Array) -> None:
    """Paint a shape onto the canvas (3, H, W), with edges that are soft over one pixel."""
    alpha = np.clip(window.depth + 0.5, 0.0, 1.0).astype(np.float32)
    part = canvas[:, window.rows, window.columns]
    for channel, dark, bright in zip(part, low, high, strict=True):
        channel += alpha * (dark + (bright - dark) * texture - channel)


class Layout(NamedTuple):
    """Where the objects of a scene are. Later objects lie on top of earlier ones."""

    labels: list[int]
    windows: list[Window]
    owner: Array  # (H, W) int64: which object is seen at each pixel, from 1; 0 where none is

    def mask(self, index: int) -> MaskCrop:
        """Return the visible pixels of an object, cut tightly."""
        window = self.windows[index]
        seen = self.owner[window.rows, window.columns] == index + 1
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        pixels = seen[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
        return MaskCrop(window.columns.start + left, window.rows.start + top, pixels)


class ShapesConfig(Section):
    """Generated scenes, which need no download. Another seed gives other scenes: use one to train, one to test."""

    kind: Literal["shapes"] = "shapes"
    length: int = Field(default=5000, ge=1, description="number of scenes")
    seed: int = Field(default=0, ge=0)
    height: int = Field(default=128, ge=32, description="of every image, in pixels")
    width: int = Field(default=128, ge=32, description="of every image, in pixels")
    classes: tuple[ShapeName, ...] = Field(default=tuple(SHAPES), min_length=1)
    objects: tuple[int, int] = Field(default=(2, 6), description="fewest and most objects in a scene")
    sizes: tuple[float, float] = Field(
        default=(0.1, 0.7), description="smallest and largest extent of objects, in shares of the shorter image side"
    )
    contrast: float = Field(
        default=0.2, ge=0.0, le=0.4, description="least mean colour difference to background and other objects"
    )
    noise: float = Field(default=6.0, ge=0.0, le=64.0, description="standard deviation of pixel noise, of 255")

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[ShapeName, ...]) -> tuple[ShapeName, ...]:
        if len(set(classes)) < len(classes):
            raise ValueError(f"each class may stand only once, got {list(classes)}")
        return classes

    @field_validator("objects")
    @classmethod
    def _countable(cls, objects: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= objects[0] <= objects[1]:
            raise ValueError(f"needs 0 <= fewest <= most, got {list(objects)}")
        return objects

    @field_validator("sizes")
    @classmethod
    def _inside_image(cls, sizes: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < sizes[0] <= sizes[1] <= 1.0:
            raise ValueError(f"needs 0 < smallest <= largest <= 1, got {list(sizes)}")
        return sizes

    def build(self) -> ShapesDataset:
        """Return the dataset; nothing is drawn before it is indexed."""
        return ShapesDataset(
            length=self.length,
            seed=self.seed,
            image_size=(self.height, self.width),
            classes=self.classes,
            objects=self.objects,
            sizes=self.sizes,
            contrast=self.contrast,
            noise=self.noise,
        )


class ShapesDataset:
    """Scenes of textured shapes on a textured background, with exact masks of what is visible of each.

    Args:
        length: how many scenes; a longer dataset of the same seed begins with the same scenes.
        seed: what all scenes come from.
        image_size: height and width in pixels, of every image.
        classes: the shapes that occur, in the order of their labels.
        objects: fewest and most objects in a scene. A crowded scene may end with fewer, but never with none unless
            that is allowed.
        sizes: smallest and largest extent of an object along its longer axis, in shares of the shorter image side;
            drawn log-uniformly.
        contrast: least mean difference between an object's colour and the background's and other objects', 0..1.
        noise: standard deviation of the pixel noise, in grey levels.
    """

    def __init__(
        self,
        *,
        length: int,
        seed: int,
        image_size: tuple[int, int] = (128, 128),
        classes: tuple[ShapeName, ...] = tuple(SHAPES),
        objects: tuple[int, int] = (2, 6),
        sizes: tuple[float, float] = (0.1, 0.7),
        contrast: float = 0.2,
        noise: float = 6.0,
    ) -> None:
        self.classes = ClassTable(names=classes, category_ids=tuple(range(1, len(classes) + 1)))
        self.length = length
        self.seed = seed
        self.image_size = image_size
        self.objects = objects
        self.sizes = sizes
        self.contrast = contrast
        self.noise = noise
        self._shapes = [SHAPES[name] for name in classes]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        """Draw scene `index`, from 0. The boxes are tight around the visible masks."""
        rng = self._generator(index)
        layout = self._arrange(rng)
        masks = tuple(layout.mask(k) for k in range(len(layout.labels)))
        corners = [(m.x, m.y, m.x + m.pixels.shape[1], m.y + m.pixels.shape[0]) for m in masks]
        return Example(
            image_id=self.image_id(index),
            pixels=torch.from_numpy(self._paint(rng, layout)),
            boxes=torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(layout.labels, dtype=torch.int64),
            masks=masks,
        )

    def image_id(self, index: int) -> int:
        """Return the id of scene `index`: ids start at 1."""
        return index + 1

    def image_sizes(self) -> Array:
        """Return heights and widths, (N, 2) int64, without drawing anything."""
        return np.tile(np.array(self.image_size, dtype=np.int64), (self.length, 1))

    def ground_truth(self) -> dict[str, Any]:
        """Return all annotations as COCO's JSON would hold them, masks as compressed RLE. Draws no pixels."""
        height, width = self.image_size
        annotations: list[dict[str, Any]] = []
        for index in range(self.length):
            for annotation in self._annotations(index):
                annotations.append({"id": len(annotations) + 1, **annotation})
        names = zip(self.classes.category_ids, self.classes.names, strict=True)
        ids = map(self.image_id, range(self.length))
        return {
            "images": [{"id": i, "file_name": f"{i:06d}.png", "height": height, "width": width} for i in ids],
            "annotations": annotations,
            "categories": [{"id": category, "name": name} for category, name in names],
        }

    def _annotations(self, index: int) -> list[dict[str, Any]]:
        layout = self._arrange(self._generator(index))
        by_column = np.asfortranarray(layout.owner)  # the order that the encoder wants
        # One object at a time: the planes of 2,000 together would take as many images.
        encoded = [rle.encode((by_column == number).view(np.uint8)) for number in range(1, len(layout.labels) + 1)]
        return [
            {
                "image_id": self.image_id(index),
                "category_id": self.classes.category_ids[label - 1],
                "segmentation": {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")},
                "area": int(rle.area(mask)),
                "bbox": rle.toBbox(mask).tolist(),
                "iscrowd": 0,
            }
            for label, mask in zip(layout.labels, encoded, strict=True)
        ]

    def _generator(self, index: int) -> Generator:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return Generator(PCG64(SeedSequence([self.seed, index])))

    def _arrange(self, rng: Generator) -> Layout:
        """Place objects one over the other; what would hide too much of an earlier one is drawn anew."""
        layout = Layout([], [], np.zeros(self.image_size, dtype=np.int64))
        visible = needed = np.zeros(1, dtype=np.int64)  # pixels of each object; entry 0 is the background
        wanted = _count(rng, *self.objects)
        for _ in range(4 * wanted):
            if len(layout.labels) == wanted:
                break
            label, window = self._draw_object(rng)
            inside = window.depth >= 0.0
            area = np.count_nonzero(inside)
            owner = layout.owner[window.rows, window.columns]
            left = visible - np.bincount(owner[inside], minlength=len(visible))
            if area < MIN_VISIBLE_PIXELS or (left < needed)[1:].any():
                continue
            layout.labels.append(label)
            layout.windows.append(window)
            owner[inside] = len(layout.labels)
            visible = np.append(left, area)
            needed = np.append(needed, max(MIN_VISIBLE_PIXELS, math.ceil(MIN_VISIBLE_SHARE * area)))
        return layout

    def _draw_object(self, rng: Generator) -> tuple[int, Window]:
        height, width = self.image_size
        label = _count(rng, 1, len(self._shapes))
        a = 0.5 * min(height, width) * _log_uniform(rng, *self.sizes)
        b = a * _between(rng, *ASPECTS)
        # The image's edge may cut an object, but takes no more than 15 percent of its longer axis.
        centre = (_between(rng, 0.7 * a, width - 0.7 * a), _between(rng, 0.7 * a, height - 0.7 * a))
        return label, _window(self._shapes[label - 1], centre, _direction(rng), (a, b), self.image_size)

    def _paint(self, rng: Generator, layout: Layout) -> Array:
        """Return the picture, (3, H, W) uint8."""
        low = _colour(rng, saturation=(0.1, 0.6), value=(0.15, 0.95))
        high = low.mixed(_colour(rng, saturation=(0.1, 0.6), value=(0.15, 0.95)), 0.7)
        texture = _texture(rng, *self.image_size)
        canvas = np.stack([dark + (bright - dark) * texture for dark, bright in zip(low, high, strict=True)])
        self._paint_strokes(rng, canvas)
        used = [low, high]
        for window in layout.windows:
            colour = _contrasting(rng, used, self.contrast)
            used.append(colour)
            texture = _texture(rng, *window.depth.shape)
            _blend(canvas, window, colour.mixed(BLACK, 0.25), colour.mixed(WHITE, 0.15), texture)
        return self._noisy(rng, canvas)

    def _paint_strokes(self, rng: Generator, canvas: Array) -> None:
        height, width = self.image_size
        for _ in range(_count(rng, *STROKES)):
            centre = (_between(rng, 0.0, width), _between(rng, 0.0, height))
            extents = (_between(rng, 0.05, 0.3) * min(height, width), _between(rng, 0.6, 1.4))
            window = _window(_stroke, centre, _direction(rng), extents, self.image_size)
            colour = _colour(rng, saturation=(0.1, 0.9), value=(0.2, 1.0))
            _blend(canvas, window, colour, colour, np.zeros((1, 1), dtype=np.float32))

    def _noisy(self, rng: Generator, canvas: Array) -> Array:
        # The sum of two bytes has a triangular density: near enough to a normal one, and exact.
        pairs = np.frombuffer(rng.bytes(2 * canvas.size), dtype=np.uint8).reshape(2, *canvas.shape)
        noise = pairs[0].astype(np.float32) + pairs[1] - 255.0
        canvas += noise * (self.noise / BYTE_PAIR_STD)
        return (np.clip(canvas, 0.0, 255.0) + 0.5).astype(np.uint8)
