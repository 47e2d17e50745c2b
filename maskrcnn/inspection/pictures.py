"""Pictures of findings: the annotated box and polygons, as they are in the file, on the part of the image around them.

Boxes are `(x1, y1, x2, y2)` in pixels of the image. Pictures are (h, w, 3) uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from maskrcnn.data.coco_file import Annotation, Image, fit_in_image, run_lengths
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.findings import Finding
from maskrcnn.data.images import read_image
from maskrcnn.data.polygons import polygons_of
from maskrcnn.data.rle import crop_from_counts
from maskrcnn.data.traps import evenly_spaced
from maskrcnn.engine.pictures import reduction, title_of
from maskrcnn.errors import InputError
from maskrcnn.inspection.reading import LARGEST
from maskrcnn.inspection.subject import Subject
from maskrcnn.visualization.colours import Colour
from maskrcnn.visualization.drawing import draw_objects
from maskrcnn.visualization.pages import data_uri

SIDE = 320  # px, the longer side of a picture
CONTEXT = 0.4  # of the longer side of the annotation, shown around it
LEAST_CONTEXT = 24  # px
EDGE = 4  # px around an annotation that leaves the image
OUTSIDE = (128, 128, 128)  # grey beyond the image
BOX: Colour = (255, 190, 0)
LINES: tuple[Colour, ...] = ((230, 40, 40), (40, 120, 255))  # of the first annotation and of further ones
MOST_RUNS = 20_000  # of a mask whose outline is drawn: the time grows with the length of its boundary
FAR = 2  # times the image's side; what lies farther away is not shown


class Picture(NamedTuple):
    """A picture on the page."""

    caption: str
    uri: str


class _Window(NamedTuple):
    """The part of the plane that a picture shows, and its scale."""

    left: int
    top: int
    width: int
    height: int
    scale: float

    def place(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Return points (n, 2) of the image as those of the picture."""
        moved = (points - (self.left, self.top)) * self.scale
        return [(float(x), float(y)) for x, y in moved]


def finding_picture(subject: Subject, finding: Finding) -> Picture | None:
    """Draw what a finding is about; None if it is about no image, or the image cannot be read."""
    image = next((image for image in subject.images if image["id"] == finding.image_id), None)
    pixels = None if image is None else _pixels(subject, image)
    if image is None or pixels is None:
        return None
    annotations = [
        annotation
        for annotation in subject.annotations_of.get(image["id"], [])
        if annotation["id"] in finding.annotation_ids
    ]
    return Picture(f"{image['file_name']}: {finding.message}", data_uri(_drawn(pixels, annotations, image)))


def samples(subject: Subject, dataset: DetectionDataset, count: int) -> list[Picture]:
    """Draw evenly spaced images of a dataset with their objects. Those that cannot be read are left out."""
    pictures = []
    for index in evenly_spaced(len(dataset), count):
        with suppress(InputError):
            example = dataset[index]
            image = example.pixels.permute(1, 2, 0).contiguous().numpy()
            drawing = (image, example.boxes, example.labels, example.masks, dataset.classes.names)
            pictures.append(
                Picture(title_of(dataset, index), data_uri(draw_objects(*drawing, scale=reduction(image, SIDE))))
            )
    return pictures


def _pixels(subject: Subject, image: Image) -> np.ndarray | None:
    path = subject.path(image)
    with suppress(InputError):
        if path is not None:
            return read_image(path).permute(1, 2, 0).contiguous().numpy()
        if subject.dataset is not None:
            ids = [subject.dataset.image_id(index) for index in range(len(subject.dataset))]
            return subject.dataset[ids.index(image["id"])].pixels.permute(1, 2, 0).contiguous().numpy()
    return None


def _drawn(pixels: np.ndarray, annotations: Sequence[Annotation], image: Image) -> np.ndarray:
    """Draw annotations on the part of an image around them, or the whole image if there are none."""
    window = _window(pixels, annotations)
    canvas = PillowImage.new("RGB", (window.width, window.height), OUTSIDE)
    canvas.paste(PillowImage.fromarray(pixels), (-window.left, -window.top))
    size = max(1, round(window.width * window.scale)), max(1, round(window.height * window.scale))
    resample = PillowImage.Resampling.NEAREST if window.scale > 1 else PillowImage.Resampling.BILINEAR
    canvas = canvas.resize(size, resample)
    for index, annotation in enumerate(annotations):
        _draw(canvas, annotation, image, window, LINES[min(index, len(LINES) - 1)])
    return np.array(canvas)


def _window(pixels: np.ndarray, annotations: Sequence[Annotation]) -> _Window:
    height, width = pixels.shape[:2]
    if not annotations:
        return _Window(0, 0, width, height, SIDE / max(width, height))
    points = np.clip(np.concatenate([*map(_points, annotations)]), *_far(width, height))
    lowest, highest = points.min(axis=0), points.max(axis=0)
    margin = max(LEAST_CONTEXT, CONTEXT * float((highest - lowest).max()))
    # Beyond the image, only as much as the annotation needs.
    low = np.maximum(lowest - margin, np.minimum(lowest - EDGE, 0))
    high = np.minimum(highest + margin, np.maximum(highest + EDGE, (width, height)))
    left, top = np.floor(low).astype(int).tolist()
    right, bottom = np.ceil(high).astype(int).tolist()
    columns, rows = max(1, right - left), max(1, bottom - top)
    return _Window(left, top, columns, rows, SIDE / max(columns, rows))


def _far(width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (-FAR * width, -FAR * height), ((FAR + 1) * width, (FAR + 1) * height)


def _points(annotation: Annotation) -> np.ndarray:
    """Return the corners of the box and the points of the polygons, (n, 2)."""
    x, y, width, height = annotation["bbox"]
    return np.concatenate([np.array([[x, y], [x + width, y + height]]), *_polygons(annotation)])


def _polygons(annotation: Annotation) -> list[np.ndarray]:
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, list):
        return []
    return [np.reshape(polygon[: len(polygon) // 2 * 2], (-1, 2)) for polygon in segmentation if len(polygon) >= 2]


def _draw(canvas: PillowImage.Image, annotation: Annotation, image: Image, window: _Window, colour: Colour) -> None:
    draw = ImageDraw.Draw(canvas)
    x, y, width, height = annotation["bbox"]
    corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]])
    draw.line(window.place(corners), fill=BOX, width=2)
    for polygon in [*_polygons(annotation), *_outlines(annotation, image)]:
        draw.line(window.place(np.concatenate([polygon, polygon[:1]])), fill=colour, width=2)


def _outlines(annotation: Annotation, image: Image) -> list[np.ndarray]:
    """Return the boundary of a run-length encoded mask as polygons (n, 2); none if it is invalid, or very long."""
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, dict) or image["height"] * image["width"] > LARGEST:
        return []
    with suppress(ValueError):
        counts = run_lengths(segmentation["counts"])
        if fit_in_image(counts, image["height"], image["width"]) and len(counts) <= MOST_RUNS:
            return polygons_of(crop_from_counts(counts, image["height"]))
    return []
