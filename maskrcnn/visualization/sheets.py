"""Sheets of several pictures: thumbnails with names in packed rows, panels in a grid, and pairs with titles.

All pictures are RGB, (h, w, 3) uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from maskrcnn.visualization.captions import FONT_SIZE, font_of
from maskrcnn.visualization.colours import BLACK, WHITE

GAP = 8  # pixels between the pictures of a sheet
TITLE_SIZE = 15
TITLE_PART = 40  # a title is 1 / 40 of the width of its picture, but at least `TITLE_SIZE`

THUMBNAILS = 100  # most pictures of a contact sheet
THUMBNAIL_SIDE = 400  # pixels, the longer side of a thumbnail that is drawn for a sheet
SHEET_WIDTH = 1600  # pixels
ROW_HEIGHT = 280  # pixels, without the names; the largest of a row


class Thumbnail(NamedTuple):
    """A picture of a contact sheet and the name below it."""

    name: str
    picture: np.ndarray  # (h, w, 3) uint8 RGB


def contact_sheet(thumbnails: Sequence[Thumbnail]) -> np.ndarray:
    """Return the thumbnails in rows of equal height, each filled up to `SHEET_WIDTH`, with their names below.

    Each row is at most `ROW_HEIGHT` high, so the sheet has at most that height for each thumbnail, whatever the sizes
    of the pictures. Pictures keep their proportions and are never enlarged.

    Args:
        thumbnails: at least one, at most `THUMBNAILS`.
    """
    assert 0 < len(thumbnails) <= THUMBNAILS
    rows = [_row(members, height) for members, height in _packed(thumbnails)]
    width = max(row.shape[1] for row in rows)
    return np.concatenate([_widened(row, width) for row in rows])


def _packed(thumbnails: Sequence[Thumbnail]) -> list[tuple[list[Thumbnail], int]]:
    """Return rows of thumbnails, each with the height that fits it into `SHEET_WIDTH`."""
    rows: list[tuple[list[Thumbnail], int]] = []
    members: list[Thumbnail] = []
    for thumbnail in thumbnails:
        if members and _fitting([*members, thumbnail]) < ROW_HEIGHT // 2:  # a panorama
            rows.append((members, _fitting(members)))
            members = []
        members.append(thumbnail)
        if _fitting(members) < ROW_HEIGHT:
            rows.append((members, _fitting(members)))
            members = []
    return [*rows, *([(members, ROW_HEIGHT)] if members else [])]


def _fitting(members: Sequence[Thumbnail]) -> int:
    """Return the height of a row that fills the width, at most `ROW_HEIGHT`."""
    ratios = sum(picture.shape[1] / picture.shape[0] for _, picture in members)
    return max(1, min(int((SHEET_WIDTH - GAP * len(members)) / ratios), ROW_HEIGHT))


def _row(members: Sequence[Thumbnail], height: int) -> np.ndarray:
    strip = FONT_SIZE + 8
    resized = [_of_height(picture, height) for _, picture in members]
    canvas = Image.new("RGB", (sum(picture.shape[1] + GAP for picture in resized), height + strip + GAP), WHITE)
    draw, x = ImageDraw.Draw(canvas), 0
    for (name, _), picture in zip(members, resized, strict=True):
        canvas.paste(Image.fromarray(picture), (x, 0))
        text = _shortened(name, picture.shape[1])
        draw.text((x, height + strip // 2), text, fill=BLACK, font=font_of(FONT_SIZE), anchor="lm")
        x += picture.shape[1] + GAP
    return np.array(canvas)


def _of_height(picture: np.ndarray, height: int) -> np.ndarray:
    """Return the picture with at most this height."""
    if picture.shape[0] <= height:
        return picture
    width = max(1, int(picture.shape[1] * height / picture.shape[0]))
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def _shortened(name: str, width: int) -> str:
    """Return a name that is at most `width` pixels wide, with dots in place of its beginning if need be."""
    font = font_of(FONT_SIZE)
    if font.getlength(name) <= width:
        return name
    rest = name[-width:]  # a character has at least a pixel
    while rest and font.getlength("..." + rest) > width:
        rest = rest[1:]
    return "..." + rest if rest else ""


def _widened(image: np.ndarray, width: int) -> np.ndarray:
    return np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)), constant_values=255)


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
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


def side_by_side(
    left: np.ndarray, right: np.ndarray, titles: tuple[str, str] = ("ground truth", "prediction")
) -> np.ndarray:
    """Return two images next to each other, each below its title."""
    return grid([titled(left, titles[0]), titled(right, titles[1])], columns=2)


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """Return the image with a title on a white strip above it."""
    size = max(TITLE_SIZE, image.shape[1] // TITLE_PART)
    strip = size + 8
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + strip), WHITE)
    canvas.paste(Image.fromarray(image), (0, strip))
    ImageDraw.Draw(canvas).text((2, strip // 2), title, fill=BLACK, font=font_of(size), anchor="lm")
    return np.array(canvas)
