"""Visualization: masks, boxes and labels drawn on images, side-by-side comparisons and contact sheets.

All images are RGB, (H, W, 3) uint8. Boxes are `(x1, y1, x2, y2)` in continuous pixels of the image.

Shapes: H, W image height and width; G objects; K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskrcnn.structures import MaskCrop

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

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
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

LEGIBLE_SIDE = 320  # minimum length of the longer image side, in pixels; smaller images are enlarged
FONT_SIZE = 11
TITLE_SIZE = 15
GAP = 8  # pixels between images of a sheet
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
) -> np.ndarray:
    """Draw masks, boxes and captions on an image, in one colour per class. The first object is drawn on top.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        boxes: (G, 4).
        labels: (G,), 1..K; labels below 1 are drawn in grey as "ignored".
        masks: G masks, each a crop or a full-size (H, W) bool array; empty to draw only boxes.
        names: K class names; label `i` is `names[i - 1]`.
        scores: (G,), written after the class names.
        scale: an integer factor by which the image is enlarged before drawing, or a factor below 1 by which it is
            reduced; by default the smallest integer with which the longer side has `LEGIBLE_SIDE` pixels.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.
    """
    scale = scale or -(-LEGIBLE_SIDE // max(image.shape[:2]))
    picture = _resized(image, scale)
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    classes = [int(label) for label in np.asarray(labels)]
    colours = [class_colour(label) for label in classes]
    assert len(masks) in (0, len(classes)), "expected one mask per object, or no masks"
    for mask, colour in reversed(list(zip(masks, colours, strict=False))):
        _tint(picture, _resized(_full_mask(mask, image.shape[:2]), scale), colour)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for (x1, y1, x2, y2), colour in reversed(list(zip(corners.tolist(), colours, strict=True))):
        # The box ends at continuous coordinates x2 and y2, so its last pixels are x2 - 1 and y2 - 1.
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour)
    _draw_captions(draw, corners, _captions(classes, names, scores), colours)
    return np.array(canvas)


def side_by_side(
    left: np.ndarray, right: np.ndarray, titles: tuple[str, str] = ("ground truth", "prediction")
) -> np.ndarray:
    """Return two images next to each other, each below its title."""
    return contact_sheet([titled(left, titles[0]), titled(right, titles[1])], columns=2)


def contact_sheet(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return images arranged in rows on a white background; all cells have the size of the largest image.

    Args:
        images: at least one (h, w, 3) uint8 RGB image; sizes may differ.
        columns: images per row.
    """
    assert images, "expected at least one image"
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = GAP + max(image.shape[0] for image in images)
    width = GAP + max(image.shape[1] for image in images)
    sheet = np.full((rows * height - GAP, columns * width - GAP, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        y, x = row * height, column * width
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


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
    """Return a copy of an image, or of an (H, W) bool mask, enlarged or reduced; see `draw_objects`."""
    if scale >= 1:
        return enlarge(image, int(scale))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    method = Image.Resampling.NEAREST if image.dtype == bool else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(image).resize((width, height), method))


def class_colour(label: int) -> Colour:
    """Return the colour of a label, 1..K; grey for labels below 1."""
    return PALETTE[(label - 1) % len(PALETTE)] if label > 0 else IGNORED


def _full_mask(mask: MaskCrop | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mask as an (H, W) bool array."""
    if not isinstance(mask, MaskCrop):
        return np.asarray(mask, dtype=bool)
    full = np.zeros(size, dtype=bool)
    height, width = mask.pixels.shape
    full[mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return full


def _tint(picture: np.ndarray, mask: np.ndarray, colour: Colour) -> None:
    """Blend a colour into the pixels of a mask and draw the mask outline, in place."""
    blended = picture[mask] * (1 - OPACITY) + np.array(colour) * OPACITY
    picture[mask] = np.rint(blended).astype(np.uint8)
    padded = np.pad(mask, 1)
    interior = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture[mask & ~interior] = colour


def _captions(labels: list[int], names: Sequence[str], scores: ArrayLike | Tensor | None) -> list[str]:
    captions = [names[label - 1] if label > 0 else "ignored" for label in labels]
    if scores is None:
        return captions
    return [f"{name} {score:.2f}" for name, score in zip(captions, np.asarray(scores).tolist(), strict=True)]


def _draw_captions(draw: ImageDraw.ImageDraw, corners: np.ndarray, captions: list[str], colours: list[Colour]) -> None:
    """Draw each caption near its box, at the position with the smallest overlap with the previous captions."""
    font = ImageFont.load_default(size=FONT_SIZE)
    drawn: list[Rectangle] = []
    for box, caption, colour in zip(corners.tolist(), captions, colours, strict=True):
        _, _, right, _ = font.getbbox(caption)
        width, height = right + 4, FONT_SIZE + 3
        candidates = _places(box, width, height, draw.im.size)
        rectangle = min(candidates, key=lambda candidate: sum(_overlap(candidate, other) for other in drawn))
        drawn.append(rectangle)
        x, y = rectangle[:2]
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        draw.text((x + 2, y + height // 2), caption, fill=_text_colour(colour), font=font, anchor="lm")


def _places(box: Rectangle, width: float, height: float, size: tuple[int, int]) -> Iterator[Rectangle]:
    """Yield candidate rectangles for a caption, best first: above, below, then inside the box; all inside the image."""
    x1, y1, x2, y2 = box
    for y in (y1 - height, y2, y1, y2 - height):
        for x in (x1, x2 - width):
            x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
            yield x, y, x + width, y + height


def _overlap(first: Rectangle, second: Rectangle) -> float:
    """Return the intersection area of two rectangles."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _text_colour(background: Colour) -> Colour:
    """Return black or white, whichever has more contrast to the background (luma of ITU-R BT.601)."""
    red, green, blue = background
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else WHITE


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """Return the image with a title on a white strip above it."""
    strip = TITLE_SIZE + 8
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + strip), WHITE)
    canvas.paste(Image.fromarray(image), (0, strip))
    font = ImageFont.load_default(size=TITLE_SIZE)
    ImageDraw.Draw(canvas).text((2, strip // 2), title, fill=BLACK, font=font, anchor="lm")
    return np.array(canvas)
