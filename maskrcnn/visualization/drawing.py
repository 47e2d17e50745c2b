"""Visualization: masks, boxes and captions drawn on an image.

All images are RGB, (H, W, 3) uint8. Boxes are `(x1, y1, x2, y2)` in continuous pixels of the image.

Shapes: H, W image height and width; G objects; K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw
from torch import Tensor

from maskrcnn.structures import MaskCrop
from maskrcnn.visualization.captions import draw_caption, place_captions
from maskrcnn.visualization.colours import Colour, ColourBy, object_colours

LEGIBLE_SIDE = 320  # minimum length of the longer image side, in pixels; smaller images are enlarged
LINE_PART = 500  # a line is 1 / 500 of the longer side of a picture wide, but at least a pixel
OPACITY = 0.4  # of the mask fill


def draw_objects(
    image: np.ndarray,
    boxes: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    masks: Sequence[MaskCrop | np.ndarray],
    names: Sequence[str],
    scores: ArrayLike | Tensor | None = None,
    *,
    scale: float | None = None,
    colour_by: ColourBy = "instance",
) -> np.ndarray:
    """Draw masks, boxes and captions on an image. The first object is drawn on top.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        boxes: (G, 4).
        labels: (G,), 1..K; labels below 1 are drawn in grey as "ignored".
        masks: G masks, each a crop or a full-size (H, W) bool array; empty to draw only boxes.
        names: K class names; label `i` is `names[i - 1]`.
        scores: (G,), written after the class names.
        scale: an integer factor by which the image is enlarged before drawing, or a factor below 1 by which it is
            reduced; by default the smallest integer with which the longer side has `LEGIBLE_SIDE` pixels.
        colour_by: "instance" gives objects that touch different colours, "class" those of a class the same one.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    classes = [int(label) for label in np.asarray(labels)]
    colours = object_colours(corners, classes, colour_by)
    return paint(image, corners, masks, captions_of(classes, names, scores), colours, scale=scale)


def paint(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Sequence[MaskCrop | np.ndarray],
    captions: Sequence[str],
    colours: Sequence[Colour],
    *,
    scale: float | None = None,
) -> np.ndarray:
    """Draw G objects with these captions and colours; see `draw_objects`.

    Lines and captions grow with the picture. A caption for which there is no room is left out
    (`captions.place_captions`).
    """
    assert len(masks) in (0, len(captions)), "expected one mask per object, or no masks"
    scale = scale or -(-LEGIBLE_SIDE // max(image.shape[:2]))
    picture = _resized(image, scale)
    line = max(1, round(max(picture.shape[:2]) / LINE_PART))
    for mask, colour in reversed(list(zip(masks, colours, strict=False))):
        _tint(picture, _resized_crop(_as_crop(mask), image.shape[:2], picture.shape[:2]), colour, line)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    corners = boxes * scale
    for (x1, y1, x2, y2), colour in reversed(list(zip(corners.tolist(), colours, strict=True))):
        # The box ends at continuous coordinates x2 and y2, so its last pixels are x2 - 1 and y2 - 1.
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
    for caption, colour in zip(place_captions(captions, corners, canvas.size), colours, strict=True):
        if caption is not None:
            draw_caption(draw, caption, colour)
    return np.array(canvas)


def captions_of(labels: Sequence[int], names: Sequence[str], scores: ArrayLike | Tensor | None) -> list[str]:
    """Return class names, followed by the scores if there are any; "ignored" for labels below 1."""
    captions = [names[label - 1] if label > 0 else "ignored" for label in labels]
    if scores is None:
        return captions
    return [f"{name} {score:.2f}" for name, score in zip(captions, np.asarray(scores).tolist(), strict=True)]


def save_image(path: Path, image: np.ndarray | Image.Image, **options: Any) -> None:
    """Write an image, as an array (H, W, 3) of uint8 RGB or Pillow's, to a file; the suffix selects the format.

    Args:
        path: the file.
        image: the image.
        options: Pillow's for this format.

    Raises:
        OSError: the disk is full or not writable. The message names the file.
    """
    try:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    except OSError as error:  # Pillow's does not always name the file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Reduce an image so that its longer side is at most `longest` pixels; a smaller image is returned unchanged."""
    factor = longest / max(image.shape[:2])
    if factor >= 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Return a copy with every pixel repeated `scale` times along both axes."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def _resized(image: np.ndarray, scale: float) -> np.ndarray:
    """Return a copy of an image, enlarged or reduced; see `draw_objects`."""
    if scale >= 1:
        return enlarge(image, int(scale))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _as_crop(mask: MaskCrop | np.ndarray) -> MaskCrop:
    return mask if isinstance(mask, MaskCrop) else MaskCrop(0, 0, np.asarray(mask, dtype=np.uint8))


def _resized_crop(crop: MaskCrop, size: tuple[int, int], new_size: tuple[int, int]) -> MaskCrop:
    """Resize the mask of an image from `size` to `new_size` (height, width), by the nearest pixel."""
    y, rows = _nearest(crop.y, crop.pixels.shape[0], size[0], new_size[0])
    x, columns = _nearest(crop.x, crop.pixels.shape[1], size[1], new_size[1])
    return MaskCrop(x, y, crop.pixels[rows[:, None], columns])


def _nearest(start: int, length: int, size: int, new_size: int) -> tuple[int, np.ndarray]:
    """Return the first new pixel whose nearest old pixel is in a crop along an axis, and the index in it of each."""
    nearest = ((np.arange(new_size) + 0.5) * (size / new_size)).astype(int) - start
    first = int(np.searchsorted(nearest, 0))
    return first, nearest[first : int(np.searchsorted(nearest, length))]


def _tint(picture: np.ndarray, crop: MaskCrop, colour: Colour, line: int) -> None:
    """Blend a colour into the pixels of a mask and draw its outline, `line` pixels wide, in place."""
    mask = crop.pixels.astype(bool)
    height, width = mask.shape
    region = picture[crop.y : crop.y + height, crop.x : crop.x + width]
    blended = region[mask] * np.float32(1 - OPACITY) + np.array(colour, np.float32) * OPACITY
    region[mask] = np.rint(blended).astype(np.uint8)
    interior = np.pad(mask, 1)
    for _ in range(line):
        interior[1:-1, 1:-1] &= interior[:-2, 1:-1] & interior[2:, 1:-1] & interior[1:-1, :-2] & interior[1:-1, 2:]
    region[mask & ~interior[1:-1, 1:-1]] = colour
