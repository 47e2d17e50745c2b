"""Masks that the model draws: paste them from their boxes into the image, or encode them as COCO run lengths.

Shapes: D detections, H x W image, M mask side, C cells along a bordered mask (M + 2), L pixels along an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PasteConvention = Literal["exact", "torchvision"]

# --- From the cells of a box to the pixels of an image -------------------------------------------------------------


class _Axis(NamedTuple):
    """How the pixels along one axis of the image read the cells of each mask, which has a border of zero cells.

    A pixel with its centre at `p` reads the cell coordinate `(p - origin) * density + offset`; whole coordinates are
    the centres of cells, and 0 is the border. Pixels outside `first <= pixel < stop` are not part of the mask.
    """

    first: Tensor  # (D,) int64, inside the image
    stop: Tensor  # (D,) int64, inside the image
    origin: Tensor  # (D,) pixels
    density: Tensor  # (D,) cells per pixel
    offset: float

    def read(self, mask: Tensor, pixel: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """The lower of the two cells between which `pixel` reads `mask`, and how far it is to the upper, 0..1.

        `mask` (int64 indices) and `pixel` broadcast; `cells` is M.
        """
        cell = (pixel + 0.5 - self.origin[mask]) * self.density[mask] + self.offset
        cell = cell.clamp(0, cells + 1)
        lower = cell.floor().clamp(max=cells)
        return lower.long(), cell - lower


def _exact_axis(low: Tensor, high: Tensor, cells: int, length: int) -> _Axis:
    """The M cells fill the box; pixels count whose centres lie inside it (borders included)."""
    first = (low - 0.5).ceil()
    has_area = high > low
    stop = torch.where(has_area, (high - 0.5).floor() + 1, first)
    extent = torch.where(has_area, high - low, 1.0)
    return _Axis(first.clamp(0, length).long(), stop.clamp(0, length).long(), low, cells / extent, offset=0.5)


def _torchvision_axis(low: Tensor, high: Tensor, cells: int, length: int) -> _Axis:
    """The box grows by one cell on each side, its ends lose their fractions, and the last pixel counts."""
    centre = (high + low) * 0.5
    half = (high - low) * 0.5 * ((cells + 2) / cells)
    first = (centre - half).long()
    extent = ((centre + half).long() - first + 1).clamp(min=1)
    density = (cells + 2) / extent.to(low.dtype)
    return _Axis(first.clamp(0, length), (first + extent).clamp(0, length), first.to(low.dtype), density, offset=-0.5)


def _axes(masks: Tensor, boxes: Tensor, height: int, width: int, convention: PasteConvention) -> tuple[_Axis, _Axis]:
    """The vertical and the horizontal axis."""
    make = _exact_axis if convention == "exact" else _torchvision_axis
    x1, y1, x2, y2 = boxes.float().unbind(1)
    return make(y1, y2, masks.shape[-2], height), make(x1, x2, masks.shape[-1], width)


def _interpolate(values: Tensor, axis: _Axis, length: int) -> Tensor:
    """Read all pixels along the second dimension: (D, C, N) to (D, length, N)."""
    mask = torch.arange(len(values), device=values.device)[:, None]
    pixel = torch.arange(length, device=values.device)
    lower, fraction = axis.read(mask, pixel, values.shape[1] - 2)
    inside = (pixel >= axis.first[:, None]) & (pixel < axis.stop[:, None])
    index = lower[..., None].expand(-1, -1, values.shape[2])
    below = values.gather(1, index)
    above = values.gather(1, index + 1)
    return (below + (above - below) * fraction[..., None]) * inside[..., None]


def paste_probabilities(
    masks: Tensor, boxes: Tensor, height: int, width: int, convention: PasteConvention = "exact"
) -> Tensor:
    """Spread each mask over its box and read it at the pixel centres of the image, bilinearly.

    `exact` is the convention of Detectron2 (`grid_sample` with `align_corners=False`; outside the mask lie zeros) for
    pixels whose centre is inside the box, and 0 for the others. `torchvision` is that of `paste_masks_in_image`:
    one more cell around the mask, ends cut to whole pixels, which makes objects up to two pixels larger.

    Args:
        masks: (D, M, M) probabilities.
        boxes: (D, 4) in pixels of the image.
        height: rows of the image.
        width: columns of the image.
        convention: see above.

    Returns:
        (D, H, W) float32.
    """
    rows, columns = _axes(masks, boxes, height, width, convention)
    bordered = F.pad(masks.float(), (1, 1, 1, 1))
    tall = _interpolate(bordered, rows, height)  # (D, C, C) -> (D, H, C)
    return _interpolate(tall.mT, columns, width).mT  # (D, H, C) -> (D, H, W)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    convention: PasteConvention = "exact",
) -> Tensor:
    """The pixels of the image that each mask covers: (D, H, W) bool, where the probability reaches `threshold`.

    An exact paste of 28 x 28 ones into the box (10, 10, 20, 20) covers 100 pixels. See `paste_probabilities` for the
    arguments.
    """
    assert threshold > 0, "outside the boxes the probability is 0"
    return paste_probabilities(masks, boxes, height, width, convention) >= threshold


# --- Run lengths ---------------------------------------------------------------------------------------------------


def encode_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    convention: PasteConvention = "exact",
) -> list[dict]:
    """COCO's compressed run lengths of `paste_masks`, pixel for pixel, without ever making an image.

    Only the pixels inside the box are read; their transitions are the run lengths. See `paste_probabilities` for the
    arguments.

    Returns:
        D times `{"size": [height, width], "counts": text}`.
    """
    assert threshold > 0, "outside the boxes the probability is 0"
    masks, boxes = masks.detach().float().cpu(), boxes.detach().cpu()
    if len(masks) == 0:
        return []
    rows, columns = _axes(masks, boxes, height, width, convention)
    # COCO counts down the columns, so the masks are transposed first and every crop is (width, height).
    bordered = F.pad(masks.mT, (1, 1, 1, 1)).numpy()
    readings = zip(bordered, _readings(rows, masks.shape[-2]), _readings(columns, masks.shape[-1]), strict=True)
    transitions = [_transitions(_crop(*reading) >= threshold) for reading in readings]
    edges, mask = _edges(transitions, rows, columns, height)
    texts = _compress(*_run_lengths(edges, np.bincount(mask, minlength=len(masks)), height * width))
    return [{"size": [height, width], "counts": text} for text in texts]


def _readings(axis: _Axis, cells: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`axis.read` for the pixels inside each box, all boxes at once: D pairs (lower cell, fraction), each (L,)."""
    lengths = axis.stop - axis.first
    ends = lengths.cumsum(0)
    mask = torch.repeat_interleave(lengths)
    pixel = torch.arange(len(mask)) - (ends - lengths - axis.first)[mask]
    lower, fraction = (part.numpy() for part in axis.read(mask, pixel, cells))
    spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    return [(lower[start:end], fraction[start:end]) for start, end in spans]


def _crop(
    bordered: np.ndarray, vertical: tuple[np.ndarray, np.ndarray], horizontal: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Read one transposed mask (C, C) at the pixels of its box: (width, height) of the crop.

    The arithmetic is that of `_interpolate`, operation for operation, so that both agree to the last bit.
    """
    lower, fraction = vertical
    tall = bordered.take(lower, axis=1) + np.diff(bordered, axis=1).take(lower, axis=1) * fraction
    lower, fraction = horizontal
    crop = np.diff(tall, axis=0).take(lower, axis=0)
    crop *= fraction[:, None]
    crop += tall.take(lower, axis=0)
    return crop


def _transitions(covered: np.ndarray) -> np.ndarray:
    """Where the runs of a crop (width, height) begin and end, counted down columns that are one pixel longer.

    A 0 before the first column and one after each column give every run a beginning and an end.
    """
    columns, rows = covered.shape
    fenced = np.zeros(1 + columns * (rows + 1), dtype=bool)
    fenced[1:].reshape(columns, rows + 1)[:, :rows] = covered
    return np.flatnonzero(fenced[1:] != fenced[:-1])


def _edges(
    transitions: Sequence[np.ndarray], rows: _Axis, columns: _Axis, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where runs begin and end, counted down the columns of the image, and the mask that each belongs to."""
    mask = np.arange(len(transitions)).repeat([len(places) for places in transitions])
    top, left = rows.first.numpy()[mask], columns.first.numpy()[mask]
    tall = (rows.stop - rows.first).numpy()[mask]
    column, row = np.divmod(np.concatenate(transitions), tall + 1)
    edges = (left + column) * height + top + row
    # In a crop as high as the image, a run that ends at the bottom may go on at the top of the next column.
    seam = np.flatnonzero((edges[1:] == edges[:-1]) & (mask[1:] == mask[:-1]))
    inner = np.concatenate((seam, seam + 1))
    return np.delete(edges, inner), np.delete(mask, inner)


def _run_lengths(edges: np.ndarray, edges_of_mask: np.ndarray, area: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the runs of 0, 1, 0, ..., one mask after another, and how many each mask (D,) has."""
    ends = np.cumsum(edges_of_mask + 2)  # with 0 before the edges of each mask and `area` after
    fenced = np.zeros(ends[-1], dtype=np.int64)
    fenced[ends - 1] = area
    inner = np.ones(len(fenced), dtype=bool)
    inner[ends - 1] = inner[ends - edges_of_mask - 2] = False
    fenced[inner] = edges
    runs = np.diff(fenced)
    last = runs[ends - 2] > 0  # there is no last run of 0 where a mask reaches the last pixel
    kept = np.ones(len(runs), dtype=bool)
    kept[ends[:-1] - 1] = False  # from one mask to the next
    kept[ends - 2] = last
    return runs[kept], edges_of_mask + last


def _compress(counts: np.ndarray, runs_of_mask: np.ndarray) -> list[str]:
    """COCO's text form of run lengths (`rleToString` of cocoapi), all masks at once.

    From the fourth on, a length is stored as the difference to the one two before. A number is written in groups of
    five bits, lowest first, in two's complement; bit 5 says that more follow; 48 makes it a printable character.
    """
    starts = runs_of_mask.cumsum() - runs_of_mask
    delayed = np.flatnonzero(np.arange(len(counts)) - starts.repeat(runs_of_mask) > 2)
    rest = counts.copy()
    rest[delayed] -= counts[delayed - 2]
    characters = np.zeros((len(counts), 7), dtype=np.uint8)  # 35 bits: enough for 2**34 pixels
    place = np.arange(len(counts))
    for group in range(characters.shape[1]):
        low, rest = rest & 31, rest >> 5
        more = rest != -(low >> 4)  # the sign is lost unless bit 4 repeats it
        characters[place, group] = low + 32 * more + 48
        place, rest = place[more], rest[more]
    written = characters > 0
    text = characters[written].tobytes().decode("ascii")
    ends = np.add.reduceat(written.sum(axis=1), starts).cumsum().tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
