"""Pictures for people: objects drawn over an image, two pictures side by side, many on one sheet.

Everything takes and returns RGB images, (H, W, 3) uint8 arrays. Boxes are `(x1, y1, x2, y2)` in continuous pixels of
the image that is drawn on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskrcnn.structures import MaskCrop

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# Okabe and Ito's seven colours, which colour-blind people can tell apart, and three of Paul Tol's for more classes.
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

LEGIBLE_SIDE = 320  # an image is enlarged until its longer side has at least so many pixels
FONT_SIZE = 11
TITLE_SIZE = 15
GAP = 8  # between pictures
OPACITY = 0.4  # of the masks' fill


def draw_objects(
    image: np.ndarray,
    boxes: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    masks: Sequence[MaskCrop | np.ndarray],
    names: Sequence[str],
    scores: ArrayLike | Tensor | None = None,
    *,
    scale: int | None = None,
) -> np.ndarray:
    """Draw masks, boxes and captions over an image; each class has its colour.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        boxes: (G, 4).
        labels: (G,), 1..K; anything below 1 is drawn in grey as "ignored".
        masks: G masks, each cropped, or a full-size (H, W) bool array; or none at all, to draw boxes only.
        names: K class names; label `i` is `names[i - 1]`.
        scores: (G,), written behind the names. Objects are drawn with the first on top, as detections come best first.
        scale: whole factor by which the picture is enlarged before drawing; by default as much as small images need
            for their captions to be read.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.
    """
    scale = scale or -(-LEGIBLE_SIDE // max(image.shape[:2]))
    picture = enlarge(image, scale)
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    classes = [int(label) for label in np.asarray(labels)]
    colours = [class_colour(label) for label in classes]
    assert len(masks) in (0, len(classes)), "a mask for each object, or none at all"
    for mask, colour in reversed(list(zip(masks, colours, strict=False))):
        _tint(picture, enlarge(_full_mask(mask, image.shape[:2]), scale), colour)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for (x1, y1, x2, y2), colour in reversed(list(zip(corners.tolist(), colours, strict=True))):
        # The last pixel inside the box is the one before its right and bottom edge.
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour)
    _draw_captions(draw, corners, _captions(classes, names, scores), colours)
    return np.array(canvas)


def side_by_side(
    left: np.ndarray, right: np.ndarray, titles: tuple[str, str] = ("ground truth", "prediction")
) -> np.ndarray:
    """Put two pictures beside each other, each under its title."""
    return contact_sheet([_titled(left, titles[0]), _titled(right, titles[1])], columns=2)


def contact_sheet(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Lay pictures out in rows on white, in reading order, in cells of the largest picture's size.

    Args:
        images: at least one (h, w, 3) uint8 RGB picture; sizes may differ.
        columns: pictures per row.
    """
    assert images, "a sheet needs a picture"
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


def save_image(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB to a file, in the format that its suffix names."""
    Image.fromarray(image).save(path)


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Resize a picture so that no side is longer than `longest` pixels; a small one comes back as it is."""
    factor = longest / max(image.shape[:2])
    if factor >= 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel `scale` times along both axes; always a copy."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def class_colour(label: int) -> Colour:
    """Return the colour of a class, from 1 on; grey below."""
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
    """Lay a translucent colour over a mask, and an opaque line on the mask's outermost pixels."""
    blended = picture[mask] * (1 - OPACITY) + np.array(colour) * OPACITY
    picture[mask] = np.rint(blended).astype(np.uint8)
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture[mask & ~inner] = colour


def _captions(labels: list[int], names: Sequence[str], scores: ArrayLike | Tensor | None) -> list[str]:
    captions = [names[label - 1] if label > 0 else "ignored" for label in labels]
    if scores is None:
        return captions
    return [f"{name} {score:.2f}" for name, score in zip(captions, np.asarray(scores).tolist(), strict=True)]


def _draw_captions(draw: ImageDraw.ImageDraw, corners: np.ndarray, captions: list[str], colours: list[Colour]) -> None:
    """Write each caption near its box, where it hides the fewest others; the first ones choose first."""
    font = ImageFont.load_default(size=FONT_SIZE)
    taken: list[Rectangle] = []
    for box, caption, colour in zip(corners.tolist(), captions, colours, strict=True):
        _, _, right, _ = font.getbbox(caption)
        width, height = right + 4, FONT_SIZE + 3
        places = _places(box, width, height, draw.im.size)
        place = min(places, key=lambda candidate: sum(_overlap(candidate, other) for other in taken))
        taken.append(place)
        x, y = place[:2]
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        draw.text((x + 2, y + height // 2), caption, fill=_ink(colour), font=font, anchor="lm")


def _places(box: Rectangle, width: float, height: float, size: tuple[int, int]) -> Iterator[Rectangle]:
    """Yield rectangles for a caption, best first: above the box, below it, then inside; never beyond the picture."""
    x1, y1, x2, y2 = box
    for y in (y1 - height, y2, y1, y2 - height):
        for x in (x1, x2 - width):
            x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
            yield x, y, x + width, y + height


def _overlap(first: Rectangle, second: Rectangle) -> float:
    """Return the area that two rectangles share."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _ink(background: Colour) -> Colour:
    """Return black or white, whichever is read better on the colour (luma of ITU-R BT.601)."""
    red, green, blue = background
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else WHITE


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    """Add a white strip with a title above the picture."""
    strip = TITLE_SIZE + 8
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + strip), WHITE)
    canvas.paste(Image.fromarray(image), (0, strip))
    font = ImageFont.load_default(size=TITLE_SIZE)
    ImageDraw.Draw(canvas).text((2, strip // 2), title, fill=BLACK, font=font, anchor="lm")
    return np.array(canvas)
