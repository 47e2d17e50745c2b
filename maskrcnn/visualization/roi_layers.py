"""Figures of the RoI layers: the cells that each layer reads for one box, its bins, sample points and output.

The drawn values come from `ops.roi_reading`. Positions are in cells of the feature map; the cell in column `j` covers
`[j, j + 1)`.

Shapes: H and W of the feature map, S output size of the RoI layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskrcnn.ops.roi import RoIAlignConfig, RoIPoolConfig, RoIWarpConfig, SamplingLayerConfig
from maskrcnn.ops.roi_reading import AxisReading, RoIReading, Span, read_box
from maskrcnn.visualization.captions import Rectangle
from maskrcnn.visualization.colours import BLACK, WHITE, Colour
from maskrcnn.visualization.sheets import grid

LAYERS: tuple[tuple[str, str, RoIPoolConfig | SamplingLayerConfig], ...] = (
    ("RoIPool, rounding: round", "box to the nearest whole cells, last one included; maximum", RoIPoolConfig()),
    ("RoIPool, rounding: floor", "box and bins cut to whole cells; maximum", RoIPoolConfig(rounding="floor")),
    ("RoIWarp", "RoIPool's rounded box, read bilinearly; average of 2 x 2 points", RoIWarpConfig()),
    ("RoIAlign", "the box as it is, read bilinearly; average of 2 x 2 points", RoIAlignConfig()),
)

# Colours of Okabe and Ito, as in `visualization.colours.PALETTE`.
BOX: Colour = (213, 94, 0)
BINS: Colour = (0, 114, 178)
POINT: Colour = (240, 228, 66)
INK: Colour = (40, 44, 52)
FAINT: Colour = (110, 116, 126)
LINE: Colour = (208, 212, 218)  # cell borders
OUTSIDE: Colour = (226, 226, 226)  # hatching outside the feature map
LOW, HIGH, STEPS = 252, 196, 7  # grey levels of the cells; few levels keep the file small

# Sizes in pixels.
TEXT, SMALL, TITLE = 12, 10, 17  # font sizes
MAP_SIDE = 600  # target length of the longer side of a drawn map
CELLS = 40, 64  # limits on the side of a drawn cell, for maps with many and with few cells
CONTEXT_SIDE = 420  # longer side of a context image
WIDEST = 1240  # maximum figure width, unless one panel is wider
MARGIN = 16
LANE = 7  # offset of the second row of brackets, which separates overlapping bins


@dataclass(frozen=True)
class View:
    """The drawn region of the feature map, and the conversion from cells to pixels. It may extend beyond the map."""

    left: int  # first column
    top: int  # first row
    columns: int
    rows: int
    cell: int  # side of a cell in pixels

    def x(self, column: float) -> float:
        """Convert a column position in cells to pixels, clipped to the drawing."""
        return min(max(column - self.left, 0), self.columns) * self.cell

    def y(self, row: float) -> float:
        """Convert a row position in cells to pixels, clipped to the drawing."""
        return min(max(row - self.top, 0), self.rows) * self.cell

    def rectangle(self, x: Span, y: Span) -> Rectangle:
        """Convert a rectangle in cells to (x1, y1, x2, y2) in pixels, clipped to the drawing."""
        return self.x(x[0]), self.y(y[0]), self.x(x[1]), self.y(y[1])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the drawing in pixels."""
        return self.columns * self.cell, self.rows * self.cell


@dataclass(frozen=True)
class Shades:
    """The grey scale and the number format of all values in a figure."""

    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Tensor) -> Shades:
        """Return the scale from the minimum to the maximum of the values."""
        return cls(values.min().item(), values.max().item())

    def colour(self, value: float) -> Colour:
        """Return the grey colour of a value; values outside the scale are clipped."""
        share = (value - self.lowest) / max(self.highest - self.lowest, 1e-12)
        grey = round(LOW + (HIGH - LOW) * round(min(max(share, 0.0), 1.0) * STEPS) / STEPS)
        return grey, grey, grey

    def text(self, value: float) -> str:
        """Return the value with two decimals, or more if all values are small, without trailing zeros."""
        largest = max(abs(self.lowest), abs(self.highest), 1e-12)
        return plain(value, decimals=min(max(2, 2 - math.floor(math.log10(largest))), 6))


@dataclass(frozen=True)
class Scene:
    """The data and layout that all panels of a figure share."""

    features: Tensor  # (H, W)
    box: Rectangle  # in cells
    stride: float  # image pixels per cell
    view: View
    shades: Shades
    labels: int  # width in pixels of the longest row label
    pooled: int  # side in pixels of a cell of the pooled grids

    @classmethod
    def of(cls, features: Tensor, box: Rectangle, stride: float, readings: Sequence[RoIReading]) -> Scene:
        """Return the scale and layout for all readings of a box, which is in pixels of the image."""
        box_in_cells = (box[0] / stride, box[1] / stride, box[2] / stride, box[3] / stride)
        values = torch.cat([features.flatten(), *(reading.pooled.flatten() for reading in readings)])
        shades = Shades.of(values)
        labels = max(_width(label) for reading in readings for label in _labels(reading.y))
        pooled = max(_width(shades.text(value)) for reading in readings for value in reading.pooled.flatten().tolist())
        view = _view(readings, box_in_cells, features)
        return cls(features, box_in_cells, stride, view, shades, labels, pooled + 12)


def plain(value: float, decimals: int = 2) -> str:
    """Return a number as text without trailing zeros, such as 2.5, 3 or 20.78."""
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def draw_roi_layers(
    features: Tensor,
    box: Rectangle,
    *,
    stride: float,
    size: int,
    title: str,
    notes: Sequence[str],
    context: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Draw one panel for each RoI layer in `LAYERS`.

    Args:
        features: (H, W) float32, one channel of a feature map; the value of a cell gives its grey level.
        box: (x1, y1, x2, y2) in pixels of the image.
        stride: image pixels per cell of the feature map.
        size: S, the output size of the RoI layers.
        title: first line of the figure.
        notes: lines below the title.
        context: (h, w, 3) uint8 RGB images above the panels, side by side.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    readings = [read_box(config, features, box, stride=stride, size=size) for _, _, config in LAYERS]
    scene = Scene.of(features, box, stride, readings)
    panels = [
        _panel(name, description, reading, scene)
        for (name, description, _), reading in zip(LAYERS, readings, strict=True)
    ]
    columns = 2 if 2 * max(panel.shape[1] for panel in panels) <= WIDEST else 1
    rows = [grid(context, columns=2)] if context else []
    return _with_heading(_stack([*rows, grid(panels, columns)]), title, notes)


def draw_box(image: np.ndarray, box: Rectangle, title: str) -> np.ndarray:
    """Draw a box on an image below a title.

    Args:
        image: (H, W, 3) uint8 RGB; it is resized to a longer side of `CONTEXT_SIDE` pixels.
        box: (x1, y1, x2, y2) in pixels of `image`.
        title: text above the image.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    scale = CONTEXT_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
    x1, y1, x2, y2 = (side * scale for side in box)
    ImageDraw.Draw(picture).rectangle((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)), outline=BOX, width=3)
    canvas = Image.new("RGB", (size[0] + 2 * MARGIN, size[1] + 56 + MARGIN), WHITE)
    canvas.paste(picture, (MARGIN, 56))
    _write(ImageDraw.Draw(canvas), (MARGIN, 30), title, TITLE - 1)
    return np.array(canvas)


def shade_map(features: Tensor) -> np.ndarray:
    """Convert a map (H, W) to a grey image (H, W, 3) uint8, with the minimum in black and the maximum in white."""
    normalized = (features - features.min()) / (features.max() - features.min()).clamp(min=1e-12)
    return (255 * normalized).round().byte()[:, :, None].expand(-1, -1, 3).numpy()


def _view(readings: Sequence[RoIReading], box: Rectangle, features: Tensor) -> View:
    """Return the region of the map to draw.

    It contains the box and all cells that are read, with a margin of one cell, and extends at most two cells beyond
    the map.
    """
    height, width = features.shape
    left, columns = _extent([reading.x for reading in readings], (box[0], box[2]), width)
    top, rows = _extent([reading.y for reading in readings], (box[1], box[3]), height)
    return View(left, top, columns, rows, _cell_side(max(columns, rows)))


def _cell_side(cells: int) -> int:
    """Return the side of a cell in pixels, for a map with the given number of cells along its longer side."""
    limit_many, limit_few = CELLS
    return min(max(min(MAP_SIDE // cells, limit_many), limit_many * 10 // cells, 4), limit_few)


def _extent(axes: Sequence[AxisReading], box_span: Span, length: int) -> tuple[int, int]:
    """Return the first cell to draw along one axis, and the number of cells."""
    spans = [box_span, *(span for axis in axes for span in (axis.region, *axis.bins))]
    first = max(math.floor(min(start for start, _ in spans)) - 1, -2)
    last = min(math.ceil(max(end for _, end in spans)) + 1, length + 2)
    return first, last - first


def _panel(name: str, description: str, reading: RoIReading, scene: Scene) -> np.ndarray:
    """Draw the panel of one layer: title, map with bin brackets, pooled grid, and summary."""
    feature_map, pooled = _draw_map(reading, scene), _draw_pooled(reading.pooled, scene)
    left, top = MARGIN + scene.labels + 2 * LANE + 8, 56 + TEXT + 2 * LANE + 10
    right = left + feature_map.width + 24
    bottom = top + max(feature_map.height, pooled.height) + 16
    summary = _summary(reading, scene)
    width = max(right + max(pooled.width, _width("pooled")), left + max(map(_width, summary))) + MARGIN
    canvas = Image.new("RGB", (width, bottom + 44), WHITE)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (MARGIN, 20), name, TITLE - 1)
    _write(draw, (MARGIN, 42), description, TEXT, FAINT)
    canvas.paste(feature_map, (left, top))
    _bracket_columns(draw, reading.x, scene.view, (left, top))
    _bracket_rows(draw, reading.y, scene.view, (left, top))
    canvas.paste(pooled, (right, top))
    _write(draw, (right, top - 12), "pooled", TEXT, FAINT)
    for line, text in enumerate(summary):
        _write(draw, (left, bottom + 18 * line), text, TEXT)
    return np.array(canvas)


def _summary(reading: RoIReading, scene: Scene) -> tuple[str, str]:
    """Describe the region that is read, and the distance of its edges from the box in image pixels."""
    (x1, x2), (y1, y2) = reading.x.region, reading.y.region
    offsets = [scene.stride * (edge - true) for edge, true in zip((x1, y1, x2, y2), scene.box, strict=True)]
    sides = zip(("left", "top", "right", "bottom"), offsets, strict=True)
    return (
        f"reads {plain(x2 - x1)} x {plain(y2 - y1)} cells: columns {plain(x1)} to {plain(x2)}, "
        f"rows {plain(y1)} to {plain(y2)}",
        "edges moved, in px: " + ", ".join(f"{side} {'+' * (offset > 0.005)}{plain(offset)}" for side, offset in sides)
        if any(abs(offset) > 0.005 for offset in offsets)
        else "edges where the box has them",
    )


def _draw_map(reading: RoIReading, scene: Scene) -> Image.Image:
    view = scene.view
    canvas = Image.new("RGB", (view.size[0] + 1, view.size[1] + 1), WHITE)
    draw = ImageDraw.Draw(canvas, "RGBA")  # the RGBA mode blends translucent colours
    _draw_cells(draw, scene)
    _draw_bins(draw, reading, view)
    draw.rectangle(view.rectangle(reading.x.region, reading.y.region), outline=BINS, width=4)
    draw.rectangle(view.rectangle((scene.box[0], scene.box[2]), (scene.box[1], scene.box[3])), outline=BOX, width=2)
    _draw_points(canvas, reading, view)
    _write_values(draw, scene)
    return canvas


def _draw_points(canvas: Image.Image, reading: RoIReading, view: View) -> None:
    xs, ys = ([point for points in axis.points for point in points] for axis in (reading.x, reading.y))
    gaps = [second - first for points in (xs, ys) for first, second in itertools.pairwise(points)]
    radius = min(max(view.cell / 8, 3.0), max(min(gaps, default=1.0) * view.cell / 3, 1.0))
    for y, x in itertools.product(ys, xs):
        if view.left <= x <= view.left + view.columns and view.top <= y <= view.top + view.rows:
            _dot(canvas, view.x(x), view.y(y), radius)


def _draw_cells(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    view, (height, width) = scene.view, scene.features.shape
    for row in range(view.top, view.top + view.rows):
        for column in range(view.left, view.left + view.columns):
            rectangle = view.rectangle((column, column + 1), (row, row + 1))
            if 0 <= row < height and 0 <= column < width:
                draw.rectangle(rectangle, fill=scene.shades.colour(scene.features[row, column].item()), outline=LINE)
            else:
                _hatch(draw, rectangle)


def _hatch(draw: ImageDraw.ImageDraw, rectangle: Rectangle) -> None:
    x1, y1, x2, y2 = rectangle
    for offset in range(0, int(x2 - x1), 6):
        draw.line((x1 + offset, y2, x2, y1 + offset), fill=OUTSIDE)
        draw.line((x1, y2 - offset, x2 - offset, y1), fill=OUTSIDE)


def _draw_bins(draw: ImageDraw.ImageDraw, reading: RoIReading, view: View) -> None:
    """Tint the region that is read, darker where bins overlap, and draw the bin borders.

    Borders of overlapping bins are inset alternately, so that they do not coincide.
    """
    x, y = reading.x, reading.y
    shared_x, shared_y = _overlaps(x), _overlaps(y)
    tinted = [(x.region, y.region), *((span, y.region) for span in shared_x), *((x.region, span) for span in shared_y)]
    for columns, rows in tinted:
        draw.rectangle(view.rectangle(columns, rows), fill=(*BINS, 34))
    for i, rows in enumerate(y.bins):
        for j, columns in enumerate(x.bins):
            x1, y1, x2, y2 = view.rectangle(columns, rows)
            inset = 1 + 2 * ((i + j) % 2) if shared_x or shared_y else 0
            if min(x2 - x1, y2 - y1) > 2 * inset:
                draw.rectangle((x1 + inset, y1 + inset, x2 - inset, y2 - inset), outline=(*BINS, 200))


def _overlaps(axis: AxisReading) -> set[Span]:
    """Return the overlaps of neighbouring bins."""
    pairs = itertools.pairwise(axis.bins)
    spans = {(second[0], min(first[1], second[1])) for first, second in pairs}
    return {(start, end) for start, end in spans if end - start > 1e-6}


def _write_values(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Write the values of the cells, if all of them fit into a cell."""
    view, (height, width) = scene.view, scene.features.shape
    rows = range(max(view.top, 0), min(view.top + view.rows, height))
    columns = range(max(view.left, 0), min(view.left + view.columns, width))
    texts = {(row, column): scene.shades.text(scene.features[row, column].item()) for row in rows for column in columns}
    size = TEXT if view.cell >= 32 else SMALL
    if max((_width(text, size) for text in texts.values()), default=0) + 4 <= view.cell:
        for (row, column), text in texts.items():
            _write(draw, (view.x(column + 0.5), view.y(row + 0.5)), text, size, INK, anchor="mm")


def _draw_pooled(pooled: Tensor, scene: Scene) -> Image.Image:
    cell = scene.pooled
    canvas = Image.new("RGB", (cell * len(pooled) + 1, cell * len(pooled) + 1), WHITE)
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(pooled.tolist()):
        for j, value in enumerate(row):
            rectangle = (j * cell, i * cell, (j + 1) * cell, (i + 1) * cell)
            draw.rectangle(rectangle, fill=scene.shades.colour(value), outline=BINS)
            _write(draw, ((j + 0.5) * cell, (i + 0.5) * cell), scene.shades.text(value), TEXT, anchor="mm")
    return canvas


def _labels(axis: AxisReading) -> list[str]:
    """Return the labels of the bins: the first and last cell for bins of whole cells, otherwise the edges."""
    if axis.points[0]:
        return [f"{plain(start)} - {plain(end)}" for start, end in axis.bins]
    return [f"{plain(start)} - {plain(end - 1)}" if end - start > 1 else plain(start) for start, end in axis.bins]


def _bracket_columns(draw: ImageDraw.ImageDraw, axis: AxisReading, view: View, corner: tuple[int, int]) -> None:
    """Draw a bracket above each column of bins, with its label if there is enough space."""
    labels, spacing = _labels(axis), _min_spacing(axis) * view.cell
    sizes = [size for size in (TEXT, SMALL) if max(_width(label, size) for label in labels) + 6 <= spacing]
    for index, (first, last) in enumerate(axis.bins):
        start, end = corner[0] + view.x(first), corner[0] + view.x(last)
        y = corner[1] - 4 - LANE * (index % 2)
        if end - start > 4:
            draw.line([(start + 2, y + 3), (start + 2, y), (end - 2, y), (end - 2, y + 3)], fill=BINS, width=2)
            for size in sizes[:1]:
                _write(draw, ((start + end) / 2, corner[1] - 2 * LANE - 10), labels[index], size, BINS, anchor="mm")


def _bracket_rows(draw: ImageDraw.ImageDraw, axis: AxisReading, view: View, corner: tuple[int, int]) -> None:
    """Draw a bracket to the left of each row of bins, with its label if there is enough space."""
    labels, spacing = _labels(axis), _min_spacing(axis) * view.cell
    for index, (first, last) in enumerate(axis.bins):
        start, end = corner[1] + view.y(first), corner[1] + view.y(last)
        x = corner[0] - 4 - LANE * (index % 2)
        if end - start > 4:
            draw.line([(x + 3, start + 2), (x, start + 2), (x, end - 2), (x + 3, end - 2)], fill=BINS, width=2)
            if spacing >= TEXT + 2:
                _write(draw, (corner[0] - 2 * LANE - 6, (start + end) / 2), labels[index], TEXT, BINS, anchor="rm")


def _min_spacing(axis: AxisReading) -> float:
    """Return the smallest distance between the starts of neighbouring bins, in cells."""
    return min((second[0] - first[0] for first, second in itertools.pairwise(axis.bins)), default=math.inf)


def _with_heading(sheet: np.ndarray, title: str, notes: Sequence[str]) -> np.ndarray:
    """Return the sheet with title, notes and legend above it."""
    y = 34 + 18 * len(notes) + 22  # vertical centre of the legend, which is at most 780 pixels wide
    width = max(sheet.shape[1], 780, *(2 * MARGIN + _width(note) for note in notes), 2 * MARGIN + _width(title, TITLE))
    canvas = Image.new("RGB", (width, y + 22 + sheet.shape[0]), WHITE)
    canvas.paste(Image.fromarray(sheet), (0, y + 22))
    draw = ImageDraw.Draw(canvas)
    _write(draw, (MARGIN, 22), title, TITLE)
    for line, note in enumerate(notes):
        _write(draw, (MARGIN, 46 + 18 * line), note, TEXT, FAINT)
    x: float = MARGIN
    draw.rectangle((x, y - 7, x + 22, y + 7), outline=BOX, width=2)
    x = _write(draw, (x + 30, y), "the box", TEXT) + 26
    draw.rectangle((x, y - 7, x + 22, y + 7), fill=(214, 230, 241), outline=BINS, width=3)
    x = _write(draw, (x + 30, y), "what the layer reads, and its bins; darker: read by several", TEXT) + 26
    _dot(canvas, x + 5, y, 5)
    x = _write(draw, (x + 18, y), "sample points", TEXT) + 26
    _hatch(draw, (x, y - 7, x + 22, y + 7))
    _write(draw, (x + 30, y), "outside the map", TEXT)
    draw.line((0, y + 21, width, y + 21), fill=LINE)
    return np.array(canvas)


def _stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Stack images vertically on a white background."""
    width = max(picture.shape[1] for picture in pictures)
    padding = [((0, 0), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.vstack(
        [np.pad(picture, pad, constant_values=255) for picture, pad in zip(pictures, padding, strict=True)]
    )


def _dot(canvas: Image.Image, x: float, y: float, radius: float) -> None:
    """Draw an antialiased disc with a dark outline, by supersampling."""
    side, factor = 2 * math.ceil(radius) + 3, 8
    corner = round(x - side / 2), round(y - side / 2)
    centre_x, centre_y = (x - corner[0]) * factor, (y - corner[1]) * factor
    for colour, r in ((INK, radius * factor), (POINT, (radius - min(1, radius / 3)) * factor)):
        large = Image.new("L", (side * factor, side * factor))
        ImageDraw.Draw(large).ellipse((centre_x - r, centre_y - r, centre_x + r, centre_y + r), fill=255)
        mask = large.resize((side, side), Image.Resampling.BOX)
        canvas.paste(colour, (*corner, corner[0] + side, corner[1] + side), mask)


def _write(
    draw: ImageDraw.ImageDraw,
    position: tuple[float, float],
    text: str,
    size: int,
    colour: Colour = BLACK,
    anchor: str = "lm",
) -> float:
    """Draw one line of text and return the x coordinate of its end."""
    draw.text(position, text, fill=colour, font=ImageFont.load_default(size=size), anchor=anchor)
    return position[0] + _width(text, size)


def _width(text: str, size: int = TEXT) -> int:
    return math.ceil(ImageFont.load_default(size=size).getlength(text))
