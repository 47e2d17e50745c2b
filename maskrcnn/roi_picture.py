"""A picture of what each RoI layer makes of one box: the cells it reads, its bins, its sample points, its result.

Everything that is drawn comes from `ops.roi_reading`. Positions are in cells of the feature map, whose cell in column
`j` covers `[j, j + 1)`.

Shapes: H and W of the feature map, S size of the grid.
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

from maskrcnn.ops.roi import RoIAlignConfig, RoIConfig, RoIPoolConfig, RoIWarpConfig
from maskrcnn.ops.roi_reading import AxisReading, RoIReading, Span, read_box
from maskrcnn.visualization import BLACK, WHITE, Colour, Rectangle, contact_sheet

LAYERS: tuple[tuple[str, str, RoIConfig], ...] = (
    ("RoIPool, rounding: round", "box to the nearest whole cells, last one included; maximum", RoIPoolConfig()),
    ("RoIPool, rounding: floor", "box and bins cut to whole cells; maximum", RoIPoolConfig(rounding="floor")),
    ("RoIWarp", "RoIPool's rounded box, read bilinearly; average of 2 x 2 points", RoIWarpConfig()),
    ("RoIAlign", "the box as it is, read bilinearly; average of 2 x 2 points", RoIAlignConfig()),
)

# Of Okabe and Ito's colours, as `visualization.PALETTE`.
BOX: Colour = (213, 94, 0)
BINS: Colour = (0, 114, 178)
POINT: Colour = (240, 228, 66)
INK: Colour = (40, 44, 52)
FAINT: Colour = (110, 116, 126)
LINE: Colour = (208, 212, 218)  # between cells
OUTSIDE: Colour = (226, 226, 226)  # stripes where there is no map
LOW, HIGH, STEPS = 252, 196, 7  # of the cells' greys: few enough for a small file

TEXT, SMALL, TITLE = 12, 10, 17  # sizes of fonts
MAP_SIDE = 600  # longest side of a drawn map
CELLS = 40, 64  # sides of a drawn cell at which a map stops growing: of many cells, and of few
CONTEXT_SIDE = 420  # longest side of a picture of context
WIDEST = 1240  # of a picture, unless one panel needs more
MARGIN = 16
LANE = 7  # two lanes of brackets, so that bins that share cells can be told apart


@dataclass(frozen=True)
class View:
    """A part of the map, enlarged: where cells land on the drawing. It may reach beyond the map."""

    left: int  # first column
    top: int  # first row
    columns: int
    rows: int
    cell: int  # pixels of the drawing per cell

    def x(self, column: float) -> float:
        """Return where a column's left edge is drawn, never outside the drawing."""
        return min(max(column - self.left, 0), self.columns) * self.cell

    def y(self, row: float) -> float:
        """Return where a row's upper edge is drawn, never outside the drawing."""
        return min(max(row - self.top, 0), self.rows) * self.cell

    def rectangle(self, x: Span, y: Span) -> Rectangle:
        """Return where a rectangle of cells is drawn."""
        return self.x(x[0]), self.y(y[0]), self.x(x[1]), self.y(y[1])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the drawing."""
        return self.columns * self.cell, self.rows * self.cell


@dataclass(frozen=True)
class Shades:
    """One scale of greys and one number format for all values of a picture."""

    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Tensor) -> Shades:
        """The scale that holds all of these values."""
        return cls(values.min().item(), values.max().item())

    def colour(self, value: float) -> Colour:
        """Return the grey of a value."""
        share = (value - self.lowest) / max(self.highest - self.lowest, 1e-12)
        grey = round(LOW + (HIGH - LOW) * round(min(max(share, 0.0), 1.0) * STEPS) / STEPS)
        return grey, grey, grey

    def text(self, value: float) -> str:
        """Return the value with two decimals, more if all values are small, and without zeros at its end."""
        largest = max(abs(self.lowest), abs(self.highest), 1e-12)
        return plain(value, decimals=min(max(2, 2 - math.floor(math.log10(largest))), 6))


@dataclass(frozen=True)
class Scene:
    """What the panels of a picture share."""

    features: Tensor  # (H, W)
    box: Rectangle  # in cells
    stride: float
    view: View
    shades: Shades
    labels: int  # pixels of the longest label of a row of bins
    pooled: int  # side in pixels of a cell of the pooled grids

    @classmethod
    def of(cls, features: Tensor, box: Rectangle, stride: float, readings: Sequence[RoIReading]) -> Scene:
        """Choose one scale and one layout that suit all readings of a box, which is in pixels of the image."""
        cells = (box[0] / stride, box[1] / stride, box[2] / stride, box[3] / stride)
        values = torch.cat([features.flatten(), *(reading.pooled.flatten() for reading in readings)])
        shades = Shades.of(values)
        labels = max(_width(label) for reading in readings for label in _labels(reading.y))
        pooled = max(_width(shades.text(value)) for reading in readings for value in reading.pooled.flatten().tolist())
        return cls(features, cells, stride, _view(readings, cells, features), shades, labels, pooled + 12)


def plain(value: float, decimals: int = 2) -> str:
    """Write a number without needless zeros: 2.5, 3, 20.78."""
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
    """Draw one panel for each RoI layer.

    Args:
        features: (H, W) float32, the map that is read; every cell is shaded by its value.
        box: (x1, y1, x2, y2) in pixels of the image.
        stride: image pixels per cell of the map.
        size: S, of the pooled grids.
        title: the first line above everything.
        notes: the lines under it.
        context: pictures to put above the panels, side by side.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    readings = [read_box(config, features, box, stride=stride, size=size) for _, _, config in LAYERS]
    scene = Scene.of(features, box, stride, readings)
    panels = [_panel(name, remark, reading, scene) for (name, remark, _), reading in zip(LAYERS, readings, strict=True)]
    columns = 2 if 2 * max(panel.shape[1] for panel in panels) <= WIDEST else 1
    rows = [contact_sheet(context, columns=2)] if context else []
    return _with_heading(_stack([*rows, contact_sheet(panels, columns)]), title, notes)


def draw_box(image: np.ndarray, box: Rectangle, title: str) -> np.ndarray:
    """Draw a box on an (H, W, 3) picture, brought to a side of `CONTEXT_SIDE`, under a title."""
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
    """Return an (H, W) map as an (H, W, 3) picture, its lowest value black and its highest white."""
    shares = (features - features.min()) / (features.max() - features.min()).clamp(min=1e-12)
    return (255 * shares).round().byte()[:, :, None].expand(-1, -1, 3).numpy()


def _view(readings: Sequence[RoIReading], box: Rectangle, features: Tensor) -> View:
    """Choose the part of the map to draw: all that is read and the box, one cell around, two beyond the map's edge."""
    height, width = features.shape
    left, columns = _extent([reading.x for reading in readings], (box[0], box[2]), width)
    top, rows = _extent([reading.y for reading in readings], (box[1], box[3]), height)
    return View(left, top, columns, rows, _cell_side(max(columns, rows)))


def _cell_side(cells: int) -> int:
    """Return how large to draw a cell of a map with so many cells a side."""
    many, few = CELLS
    return min(max(min(MAP_SIDE // cells, many), many * 10 // cells, 4), few)


def _extent(axes: Sequence[AxisReading], side: Span, length: int) -> tuple[int, int]:
    spans = [side, *(span for axis in axes for span in (axis.region, *axis.bins))]
    first = max(math.floor(min(start for start, _ in spans)) - 1, -2)
    last = min(math.ceil(max(end for _, end in spans)) + 1, length + 2)
    return first, last - first


def _panel(name: str, remark: str, reading: RoIReading, scene: Scene) -> np.ndarray:
    """Draw one layer: its title, the map between the brackets of the bins, the pooled grid and the moved edges."""
    drawn, pooled = _draw_map(reading, scene), _draw_pooled(reading.pooled, scene)
    left, top = MARGIN + scene.labels + 2 * LANE + 8, 56 + TEXT + 2 * LANE + 10
    right = left + drawn.width + 24
    under = top + max(drawn.height, pooled.height) + 16
    account = _account(reading, scene)
    width = max(right + max(pooled.width, _width("pooled")), left + max(map(_width, account))) + MARGIN
    canvas = Image.new("RGB", (width, under + 44), WHITE)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (MARGIN, 20), name, TITLE - 1)
    _write(draw, (MARGIN, 42), remark, TEXT, FAINT)
    canvas.paste(drawn, (left, top))
    _bracket_columns(draw, reading.x, scene.view, (left, top))
    _bracket_rows(draw, reading.y, scene.view, (left, top))
    canvas.paste(pooled, (right, top))
    _write(draw, (right, top - 12), "pooled", TEXT, FAINT)
    for line, text in enumerate(account):
        _write(draw, (left, under + 18 * line), text, TEXT)
    return np.array(canvas)


def _account(reading: RoIReading, scene: Scene) -> tuple[str, str]:
    """Say what is read, and by how many pixels of the image that is not the box."""
    (x1, x2), (y1, y2) = reading.x.region, reading.y.region
    moved = [scene.stride * (edge - true) for edge, true in zip((x1, y1, x2, y2), scene.box, strict=True)]
    sides = zip(("left", "top", "right", "bottom"), moved, strict=True)
    return (
        f"reads {plain(x2 - x1)} x {plain(y2 - y1)} cells: columns {plain(x1)} to {plain(x2)}, "
        f"rows {plain(y1)} to {plain(y2)}",
        "edges moved, in px: " + ", ".join(f"{side} {'+' * (by > 0.005)}{plain(by)}" for side, by in sides)
        if any(abs(by) > 0.005 for by in moved)
        else "edges where the box has them",
    )


def _draw_map(reading: RoIReading, scene: Scene) -> Image.Image:
    view = scene.view
    canvas = Image.new("RGB", (view.size[0] + 1, view.size[1] + 1), WHITE)
    draw = ImageDraw.Draw(canvas, "RGBA")  # in this mode it blends translucent colours
    _draw_cells(draw, scene)
    _draw_bins(draw, reading, view)
    draw.rectangle(view.rectangle(reading.x.region, reading.y.region), outline=BINS, width=4)
    draw.rectangle(view.rectangle((scene.box[0], scene.box[2]), (scene.box[1], scene.box[3])), outline=BOX, width=2)
    _draw_points(canvas, reading, view)
    _write_values(draw, scene)
    return canvas


def _draw_points(canvas: Image.Image, reading: RoIReading, view: View) -> None:
    across, down = ([point for points in axis.points for point in points] for axis in (reading.x, reading.y))
    gaps = [second - first for points in (across, down) for first, second in itertools.pairwise(points)]
    radius = min(max(view.cell / 8, 3.0), max(min(gaps, default=1.0) * view.cell / 3, 1.0))
    for y, x in itertools.product(down, across):
        if view.left <= x <= view.left + view.columns and view.top <= y <= view.top + view.rows:
            _dot(canvas, view.x(x), view.y(y), radius)


def _draw_cells(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    view, (height, width) = scene.view, scene.features.shape
    for row in range(view.top, view.top + view.rows):
        for column in range(view.left, view.left + view.columns):
            place = view.rectangle((column, column + 1), (row, row + 1))
            if 0 <= row < height and 0 <= column < width:
                draw.rectangle(place, fill=scene.shades.colour(scene.features[row, column].item()), outline=LINE)
            else:
                _hatch(draw, place)


def _hatch(draw: ImageDraw.ImageDraw, place: Rectangle) -> None:
    x1, y1, x2, y2 = place
    for offset in range(0, int(x2 - x1), 6):
        draw.line((x1 + offset, y2, x2, y1 + offset), fill=OUTSIDE)
        draw.line((x1, y2 - offset, x2 - offset, y1), fill=OUTSIDE)


def _draw_bins(draw: ImageDraw.ImageDraw, reading: RoIReading, view: View) -> None:
    """Tint what is read, what several bins read darker, and draw the bins' edges, neighbours one inside the other."""
    x, y = reading.x, reading.y
    shared_x, shared_y = _shared(x), _shared(y)
    tinted = [(x.region, y.region), *((span, y.region) for span in shared_x), *((x.region, span) for span in shared_y)]
    for columns, rows in tinted:
        draw.rectangle(view.rectangle(columns, rows), fill=(*BINS, 34))
    for i, rows in enumerate(y.bins):
        for j, columns in enumerate(x.bins):
            x1, y1, x2, y2 = view.rectangle(columns, rows)
            inset = 1 + 2 * ((i + j) % 2) if shared_x or shared_y else 0
            if min(x2 - x1, y2 - y1) > 2 * inset:
                draw.rectangle((x1 + inset, y1 + inset, x2 - inset, y2 - inset), outline=(*BINS, 200))


def _shared(axis: AxisReading) -> set[Span]:
    """Return the spans that two neighbouring bins share."""
    pairs = itertools.pairwise(axis.bins)
    spans = {(second[0], min(first[1], second[1])) for first, second in pairs}
    return {(start, end) for start, end in spans if end - start > 1e-6}


def _write_values(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Write the cells' values, if the longest of them fits a cell."""
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
            place = (j * cell, i * cell, (j + 1) * cell, (i + 1) * cell)
            draw.rectangle(place, fill=scene.shades.colour(value), outline=BINS)
            _write(draw, ((j + 0.5) * cell, (i + 0.5) * cell), scene.shades.text(value), TEXT, anchor="mm")
    return canvas


def _labels(axis: AxisReading) -> list[str]:
    """Name the bins: first and last cell where they are whole cells, else the edges."""
    if axis.points[0]:
        return [f"{plain(start)} - {plain(end)}" for start, end in axis.bins]
    return [f"{plain(start)} - {plain(end - 1)}" if end - start > 1 else plain(start) for start, end in axis.bins]


def _bracket_columns(draw: ImageDraw.ImageDraw, axis: AxisReading, view: View, corner: tuple[int, int]) -> None:
    """Draw a bracket over each column of bins, and over it which cells it has, where there is room for it."""
    labels, room = _labels(axis), _distance(axis) * view.cell
    sizes = [size for size in (TEXT, SMALL) if max(_width(label, size) for label in labels) + 6 <= room]
    for index, (first, last) in enumerate(axis.bins):
        start, end = corner[0] + view.x(first), corner[0] + view.x(last)
        y = corner[1] - 4 - LANE * (index % 2)
        if end - start > 4:
            draw.line([(start + 2, y + 3), (start + 2, y), (end - 2, y), (end - 2, y + 3)], fill=BINS, width=2)
            for size in sizes[:1]:
                _write(draw, ((start + end) / 2, corner[1] - 2 * LANE - 10), labels[index], size, BINS, anchor="mm")


def _bracket_rows(draw: ImageDraw.ImageDraw, axis: AxisReading, view: View, corner: tuple[int, int]) -> None:
    """Draw a bracket left of each row of bins, and left of it which cells it has, where there is room for it."""
    labels, room = _labels(axis), _distance(axis) * view.cell
    for index, (first, last) in enumerate(axis.bins):
        start, end = corner[1] + view.y(first), corner[1] + view.y(last)
        x = corner[0] - 4 - LANE * (index % 2)
        if end - start > 4:
            draw.line([(x + 3, start + 2), (x, start + 2), (x, end - 2), (x + 3, end - 2)], fill=BINS, width=2)
            if room >= TEXT + 2:
                _write(draw, (corner[0] - 2 * LANE - 6, (start + end) / 2), labels[index], TEXT, BINS, anchor="rm")


def _distance(axis: AxisReading) -> float:
    """Return how far the starts of neighbouring bins are apart at least, in cells."""
    return min((second[0] - first[0] for first, second in itertools.pairwise(axis.bins)), default=math.inf)


def _with_heading(sheet: np.ndarray, title: str, notes: Sequence[str]) -> np.ndarray:
    """Put a title, notes and the legend above the panels."""
    y = 34 + 18 * len(notes) + 22  # the middle of the legend, which is 780 pixels wide
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
    """Put pictures under each other, on white."""
    width = max(picture.shape[1] for picture in pictures)
    sides = [((0, 0), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.vstack(
        [np.pad(picture, side, constant_values=255) for picture, side in zip(pictures, sides, strict=True)]
    )


def _dot(canvas: Image.Image, x: float, y: float, radius: float) -> None:
    """Draw a smooth disc with a dark rim: drawn large, then reduced."""
    side, finer = 2 * math.ceil(radius) + 3, 8
    corner = round(x - side / 2), round(y - side / 2)
    middle_x, middle_y = (x - corner[0]) * finer, (y - corner[1]) * finer
    for colour, reach in ((INK, radius * finer), (POINT, (radius - min(1, radius / 3)) * finer)):
        large = Image.new("L", (side * finer, side * finer))
        ends = (middle_x - reach, middle_y - reach, middle_x + reach, middle_y + reach)
        ImageDraw.Draw(large).ellipse(ends, fill=255)
        mask = large.resize((side, side), Image.Resampling.BOX)
        canvas.paste(colour, (*corner, corner[0] + side, corner[1] + side), mask)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: Colour = BLACK,
    anchor: str = "lm",
) -> float:
    """Write one line and return where it ends."""
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size=size), anchor=anchor)
    return place[0] + _width(text, size)


def _width(text: str, size: int = TEXT) -> int:
    return math.ceil(ImageFont.load_default(size=size).getlength(text))
