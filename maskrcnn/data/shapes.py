"""Synthetic scenes: images with labelled objects, generated on the fly from a seed.

A scene depends only on the seed of the dataset and on its index. It is bit-identical on every machine. For that, this
file uses only operations that IEEE 754 defines exactly: additions, multiplications, divisions, square roots, roundings
and comparisons of single numbers. It does not use sines, exponentials, matrix products or sums over float arrays,
because their rounding depends on the library and the processor.

Shapes: N scenes; H, W image height and width; h, w window height and width; K classes.

Coordinates are continuous: the centre of the pixel in row i and column j is (j + 0.5, i + 0.5). A pixel belongs to an
object if its centre lies inside. The object frame has its origin at the object's centre; u runs along the longer
semi-axis a, and v along the shorter semi-axis b.
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

from maskrcnn.data.dataset import DatasetConfig
from maskrcnn.structures import ClassTable, Example, MaskCrop

Array = np.ndarray
ShapeName = Literal["disc", "ring", "rectangle", "frame", "triangle", "cross", "star", "crescent"]

ASPECTS = (0.5, 1.0)  # range of b / a; thinner objects resemble the strokes in the background
MIN_VISIBLE_SHARE = 0.4  # share of an object's pixels that must stay visible
MIN_VISIBLE_PIXELS = 16
STROKES = (2, 6)  # range of the number of background strokes, which belong to no class
BYTE_PAIR_STD = 104.5  # standard deviation of the sum of two uniform bytes


# Depth functions: the signed distance of a point to the outline of a shape in pixels, positive inside. They are exact
# near straight edges and a first-order approximation near curves.


def _ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    p, q = u / a, v / b
    # The implicit function 1 - p^2 - q^2 divided by the norm of its gradient; the constant avoids 0 / 0 at the centre.
    return (1.0 - p * p - q * q) / (2.0 * np.sqrt((p / a) * (p / a) + (q / b) * (q / b)) + 1e-9)


def _ring(u: Array, v: Array, a: float, b: float) -> Array:
    return np.minimum(_ellipse(u, v, a, b), -_ellipse(u, v, 0.55 * a, 0.55 * b))


def _rectangle(u: Array, v: Array, a: float, b: float) -> Array:
    return np.minimum(a - np.abs(u), b - np.abs(v))


def _frame(u: Array, v: Array, a: float, b: float) -> Array:
    depth = _rectangle(u, v, a, b)
    return np.minimum(depth, 0.45 * b - depth)


def _triangle(u: Array, v: Array, a: float, b: float) -> Array:
    # Isosceles, with the apex at (a, 0) and the base from (-a, -b) to (-a, b).
    side = (a * b - b * u - 2.0 * a * np.abs(v)) / math.sqrt(b * b + 4.0 * a * a)
    return np.minimum(side, a + u)


def _cross(u: Array, v: Array, a: float, b: float) -> Array:
    thin = 0.28 * b
    return np.maximum(_rectangle(u, v, a, thin), _rectangle(u, v, thin, b))


# Cosines and sines of 0, 72, 144, 216 and 288 degrees: the normals of the five lines of a pentagram.
PENTAGRAM = (
    (1.0, 0.0),
    (0.30901699437494745, 0.9510565162951535),
    (-0.8090169943749475, 0.5877852522924731),
    (-0.8090169943749475, -0.5877852522924731),
    (0.30901699437494745, -0.9510565162951535),
)


def _star(u: Array, v: Array, a: float, b: float) -> Array:
    # A point is inside the pentagram if it is on the inner side of at least four of the five lines, so the depth is
    # the second smallest distance.
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


# Random numbers. Only Generator.random and .bytes are used: the rounding of `uniform` and `normal` depends on the
# machine.


def _between(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _count(rng: Generator, low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, both inclusive."""
    return low + int(rng.random() * (high - low + 1))


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    """Draw from the density 1/x by rejection sampling, without a logarithm."""
    while True:
        value = _between(rng, low, high)
        if rng.random() * value < low:
            return value


def _direction(rng: Generator) -> tuple[float, float]:
    """Return the cosine and sine of a uniform random angle, from a point in the unit disc divided by its norm."""
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
        """Return the mean absolute difference of the channels, from 0 to 1."""
        return (abs(self.red - other.red) + abs(self.green - other.green) + abs(self.blue - other.blue)) / 765.0

    def mixed(self, other: Colour, share: float) -> Colour:
        """Return the linear interpolation to `other`, with weight `share` for `other`."""
        return Colour(*(start + share * (end - start) for start, end in zip(self, other, strict=True)))


BLACK = Colour(0.0, 0.0, 0.0)
WHITE = Colour(255.0, 255.0, 255.0)


def _colour(rng: Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    """Draw an HSV colour of any hue, with saturation and value in the given ranges."""
    hue = 6.0 * rng.random()
    chroma = _between(rng, *saturation)
    brightest = 255.0 * _between(rng, *value)
    wheel = ((offset + hue) % 6.0 for offset in (5.0, 3.0, 1.0))
    return Colour(*(brightest * (1.0 - chroma * max(0.0, min(k, 4.0 - k, 1.0))) for k in wheel))


def _contrasting(rng: Generator, others: list[Colour], contrast: float) -> Colour:
    """Draw 12 candidate colours and return the first at distance `contrast` from all others, or else the farthest."""

    def min_distance(colour: Colour) -> float:
        return min(colour.distance(other) for other in others)

    candidates = [_colour(rng, saturation=(0.3, 0.95), value=(0.3, 1.0)) for _ in range(12)]
    return next(
        (colour for colour in candidates if min_distance(colour) >= contrast), max(candidates, key=min_distance)
    )


# Textures, (h, w) float32 from 0 to 1.


def _interpolate(values: Array, length: int) -> Array:
    """Interpolate linearly along axis 0 to `length` rows."""
    position = (np.arange(length) + 0.5) * (len(values) - 1) / length
    knot = position.astype(np.int64)
    weight = (position - knot).astype(np.float32)[:, None]
    return values[knot] + weight * (values[knot + 1] - values[knot])


def _waves(rng: Generator, height: int, width: int, period: float) -> Array:
    """Draw a triangle wave with a random direction and phase; `period` is in pixels."""
    cos, sin = _direction(rng)
    phase_x = (np.arange(width) * (cos / period)).astype(np.float32)
    phase_y = (np.arange(height) * (sin / period) + rng.random()).astype(np.float32)
    phase = phase_x + phase_y[:, None]
    return np.abs(2.0 * (phase - np.floor(phase)) - 1.0)


def _texture(rng: Generator, height: int, width: int) -> Array:
    """Mix a slow gradient, stripes and smooth noise with random weights."""
    gradient = _waves(rng, height, width, period=_between(rng, 1.5, 3.0) * max(height, width))
    stripes = _waves(rng, height, width, period=_between(rng, 4.0, 24.0))
    knots = rng.random((5, 5)).astype(np.float32)
    noise = _interpolate(_interpolate(knots, height).T, width).T
    weights = [0.2 + rng.random() for _ in range(3)]
    total = weights[0] + weights[1] + weights[2]
    return gradient * (weights[0] / total) + stripes * (weights[1] * 0.6 / total) + noise * (weights[2] / total)


class Window(NamedTuple):
    """The image region around one shape, and the depth of each pixel centre inside the shape."""

    rows: slice
    columns: slice
    depth: Array  # (h, w) float64, pixels


def _window(
    shape: Depth, centre: tuple[float, float], angle: tuple[float, float], extents: tuple[float, float],
    image_size: tuple[int, int],
) -> Window:  # fmt: skip
    """Evaluate a shape in its bounding box, clipped to the image.

    Args:
        shape: the depth function.
        centre: (x, y) in pixels, inside the image.
        angle: cosine and sine of the direction of the longer axis.
        extents: the semi-axes a and b in pixels.
        image_size: height and width in pixels.
    """
    (x, y), (cos, sin), (a, b), (height, width) = centre, angle, extents, image_size
    half_width = abs(cos) * a + abs(sin) * b + 1.0  # with one pixel for the antialiased edge
    half_height = abs(sin) * a + abs(cos) * b + 1.0
    rows = slice(max(0, math.floor(y - half_height)), min(height, math.ceil(y + half_height)))
    columns = slice(max(0, math.floor(x - half_width)), min(width, math.ceil(x + half_width)))
    dx = np.arange(columns.start, columns.stop) + (0.5 - x)
    dy = (np.arange(rows.start, rows.stop) + (0.5 - y))[:, None]
    return Window(rows, columns, shape(dx * cos + dy * sin, dy * cos - dx * sin, a, b))


def _blend(canvas: Array, window: Window, low: Colour, high: Colour, texture: Array) -> None:
    """Paint a shape onto the canvas (3, H, W) in place, with antialiased edges."""
    alpha = np.clip(window.depth + 0.5, 0.0, 1.0).astype(np.float32)
    region = canvas[:, window.rows, window.columns]
    for channel, dark, bright in zip(region, low, high, strict=True):
        channel += alpha * (dark + (bright - dark) * texture - channel)


class Layout(NamedTuple):
    """The placement of the objects of a scene. Later objects occlude earlier ones."""

    labels: list[int]
    windows: list[Window]
    owner: Array  # (H, W) int64: number of the visible object at each pixel, from 1; 0 for background

    def mask(self, index: int) -> MaskCrop:
        """Return the visible pixels of an object as a tight crop."""
        window = self.windows[index]
        visible = self.owner[window.rows, window.columns] == index + 1
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        pixels = visible[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
        return MaskCrop(window.columns.start + left, window.rows.start + top, pixels)


class ShapesConfig(DatasetConfig):
    """Synthetic scenes; no download is needed. Use different seeds for training and validation."""

    kind: Literal["shapes"] = "shapes"
    length: int = Field(default=5000, ge=1, le=2**24, description="number of scenes")
    seed: int = Field(default=0, ge=0)
    height: int = Field(default=128, ge=32, le=2**14, description="image height in pixels")
    width: int = Field(default=128, ge=32, le=2**14, description="image width in pixels")
    classes: tuple[ShapeName, ...] = Field(default=tuple(SHAPES), min_length=1)
    objects: tuple[int, int] = Field(default=(2, 6), description="minimum and maximum number of objects per scene")
    sizes: tuple[float, float] = Field(
        default=(0.1, 0.7), description="minimum and maximum object length, as a fraction of the shorter image side"
    )
    contrast: float = Field(
        default=0.2, ge=0.0, le=0.4, description="minimum mean colour difference to the background and other objects"
    )
    noise: float = Field(
        default=6.0, ge=0.0, le=64.0, description="standard deviation of the pixel noise, in grey levels (0..255)"
    )

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[ShapeName, ...]) -> tuple[ShapeName, ...]:
        if len(set(classes)) < len(classes):
            raise ValueError(f"each class may occur only once, got {list(classes)}")
        return classes

    @field_validator("objects")
    @classmethod
    def _countable(cls, objects: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= objects[0] <= objects[1] <= 1000:
            raise ValueError(f"expected 0 <= minimum <= maximum <= 1000, got {list(objects)}")
        return objects

    @field_validator("sizes")
    @classmethod
    def _inside_image(cls, sizes: tuple[float, float]) -> tuple[float, float]:
        if not 0.001 <= sizes[0] <= sizes[1] <= 1.0:
            raise ValueError(f"expected 0.001 <= minimum <= maximum <= 1, got {list(sizes)}")
        return sizes

    def build(self) -> ShapesDataset:
        """Return the dataset. Scenes are generated when they are indexed."""
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
    """Scenes of textured shapes on a textured background, with exact masks of the visible pixels of each object.

    Args:
        length: number of scenes N; a longer dataset with the same seed begins with the same scenes.
        seed: seed of all scenes.
        image_size: height and width of all images, in pixels.
        classes: names of the shapes, in the order of their labels.
        objects: minimum and maximum number of objects per scene. A crowded scene may have fewer, but not zero unless
            the minimum is 0.
        sizes: minimum and maximum length of an object along its longer axis, as a fraction of the shorter image side;
            drawn log-uniformly.
        contrast: minimum mean colour difference of an object to the background and the other objects, 0..1. If no
            candidate colour reaches it, the colour with the largest difference is used.
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
        """Return scene `index`, from 0. Boxes are tight around the visible pixels.

        Raises:
            IndexError: `index` is not in 0..N-1.
        """
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
        """Return the image id of scene `index`; ids start at 1."""
        return index + 1

    def labels(self, index: int) -> Array:
        """Return the labels of the objects of scene `index`, (G,) int64. It is arranged, but not rendered."""
        return np.array(self._arrange(self._generator(index)).labels, dtype=np.int64)

    def image_sizes(self) -> Array:
        """Return height and width of each image, (N, 2) int64."""
        return np.tile(np.array(self.image_size, dtype=np.int64), (self.length, 1))

    def origin(self) -> dict[str, str]:
        """Return the parameters of the scenes."""
        names = ("seed", "image_size", "objects", "sizes", "contrast", "noise")
        parameters = [f"{name} {getattr(self, name)}" for name in names]
        return {"generated": "; ".join(["shapes", *parameters, f"classes {', '.join(self.classes.names)}"])}

    def ground_truth(self) -> dict[str, Any]:
        """Return the annotations of all scenes in COCO format, with compressed RLE masks. Images are not rendered."""
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
        owner = np.asfortranarray(layout.owner)  # the memory order that the encoder requires
        # Encoded one object at a time, because the full-size masks of many objects together need much memory.
        encoded = [rle.encode((owner == number).view(np.uint8)) for number in range(1, len(layout.labels) + 1)]
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
        """Place objects in order; an object that would occlude too much of an earlier one is rejected."""
        layout = Layout([], [], np.zeros(self.image_size, dtype=np.int64))
        # Visible and required pixels of each object; entry 0 is the background.
        visible = required = np.zeros(1, dtype=np.int64)
        num_objects = _count(rng, *self.objects)
        for _ in range(4 * num_objects):
            if len(layout.labels) == num_objects:
                break
            label, window = self._draw_object(rng)
            inside = window.depth >= 0.0
            area = np.count_nonzero(inside)
            owner = layout.owner[window.rows, window.columns]
            still_visible = visible - np.bincount(owner[inside], minlength=len(visible))
            if area < MIN_VISIBLE_PIXELS or (still_visible < required)[1:].any():
                continue
            layout.labels.append(label)
            layout.windows.append(window)
            owner[inside] = len(layout.labels)
            visible = np.append(still_visible, area)
            required = np.append(required, max(MIN_VISIBLE_PIXELS, math.ceil(MIN_VISIBLE_SHARE * area)))
        return layout

    def _draw_object(self, rng: Generator) -> tuple[int, Window]:
        height, width = self.image_size
        label = _count(rng, 1, len(self._shapes))
        a = 0.5 * min(height, width) * _log_uniform(rng, *self.sizes)
        b = a * _between(rng, *ASPECTS)
        # An object may be truncated at the image border, by at most 15 percent of its longer axis.
        centre = (_between(rng, 0.7 * a, width - 0.7 * a), _between(rng, 0.7 * a, height - 0.7 * a))
        return label, _window(self._shapes[label - 1], centre, _direction(rng), (a, b), self.image_size)

    def _paint(self, rng: Generator, layout: Layout) -> Array:
        """Render the image, (3, H, W) uint8 RGB."""
        low = _colour(rng, saturation=(0.1, 0.6), value=(0.15, 0.95))
        high = low.mixed(_colour(rng, saturation=(0.1, 0.6), value=(0.15, 0.95)), 0.7)
        texture = _texture(rng, *self.image_size)
        canvas = np.stack([dark + (bright - dark) * texture for dark, bright in zip(low, high, strict=True)])
        self._paint_strokes(rng, canvas)
        used_colours = [low, high]
        for window in layout.windows:
            colour = _contrasting(rng, used_colours, self.contrast)
            used_colours.append(colour)
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
        # The sum of two uniform bytes has a triangular density, which approximates a normal one without rounding.
        pairs = np.frombuffer(rng.bytes(2 * canvas.size), dtype=np.uint8).reshape(2, *canvas.shape)
        noise = pairs[0].astype(np.float32) + pairs[1] - 255.0
        canvas += noise * (self.noise / BYTE_PAIR_STD)
        return (np.clip(canvas, 0.0, 255.0) + 0.5).astype(np.uint8)
