"""Masks between boxes and images: paste them, encode them as COCO run lengths, read ground truth inside boxes.

Shapes: B images, R regions, D detections, G objects, H x W image, M mask side, C cells along a bordered mask
(M + 2), L pixels along an axis, T entries of all summed-area tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from maskrcnn.structures import MaskCrop, MaskTables

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


# --- Ground truth --------------------------------------------------------------------------------------------------


def tabulate(
    crops: Sequence[Sequence[MaskCrop]], scales: Sequence[tuple[float, float]], objects_per_image: int
) -> MaskTables:
    """Turn the masks of a batch into summed-area tables.

    Args:
        crops: the masks of each of B images, at most `objects_per_image` of each.
        scales: resized pixels per annotated pixel of each image, along x and y.
        objects_per_image: G, at least 1; images with fewer objects are padded.
    """
    sizes = np.zeros((len(crops), objects_per_image, 2), dtype=np.int64)
    origins = np.zeros((len(crops), objects_per_image, 2), dtype=np.float32)
    starts = np.zeros((len(crops), objects_per_image), dtype=np.int64)
    tables = [np.zeros(1, dtype=np.int32)]  # what padding reads, and the reason why T is never 0
    end = 1
    for b, image in enumerate(crops):
        assert len(image) <= objects_per_image, f"{len(image)} masks for {objects_per_image} places"
        for g, crop in enumerate(image):
            sizes[b, g], origins[b, g], starts[b, g] = crop.pixels.shape, (crop.x, crop.y), end
            tables.append(_summed_area(crop.pixels).ravel())
            end += tables[-1].size
    return MaskTables(
        sums=torch.from_numpy(np.concatenate(tables)),
        starts=torch.from_numpy(starts),
        sizes=torch.from_numpy(sizes),
        origins=torch.from_numpy(origins),
        scales=torch.tensor(scales, dtype=torch.float32).reshape(-1, 2),
    )


def _summed_area(pixels: np.ndarray) -> np.ndarray:
    """(h, w) of 0 and 1 to (h + 1, w + 1) int32: how many ones lie above and left of each corner."""
    table = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1), dtype=np.int32)
    np.cumsum(pixels, axis=0, dtype=np.int32, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    return table


def _difference(corners: Tensor) -> Tensor:
    """From values at the corners of a grid (..., M + 1, M + 1) to the sums over its cells (..., M, M)."""
    return corners.diff(dim=-1).diff(dim=-2)


def _between(coordinate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The table entry below a coordinate (clamped to 0..limit), the step to the one above, and the fraction."""
    coordinate = coordinate.clamp(min=0).minimum(limit[..., None])
    lower = coordinate.floor().long().minimum(limit[..., None] - 1).clamp(min=0)
    return lower, (limit > 0).long()[..., None], coordinate - lower


def mask_coverage(tables: MaskTables, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The share of each cell of an M x M grid over a box that the mask of the matched object covers.

    It is exact up to rounding: between its entries a summed-area table grows bilinearly, so four bilinear look-ups
    give the covered area of a cell, whatever its size.

    Args:
        tables: masks of the batch.
        boxes: (B, R, 4) in pixels of the resized image.
        matched: (B, R) int64, index of the object of each box.
        size: M.

    Returns:
        (B, R, M, M) float32 in 0..1; 0 in boxes without area and for objects without a mask.
    """
    height, width = tables.sizes.gather(1, matched[..., None].expand(-1, -1, 2)).unbind(-1)  # (B, R)
    origin = tables.origins.gather(1, matched[..., None].expand(-1, -1, 2))
    scale = tables.scales[:, None]
    corner = boxes[..., :2] / scale - origin  # in pixels of the object's table
    span = ((boxes[..., 2:] - boxes[..., :2]) / scale).clamp(min=0)
    ticks = torch.arange(size + 1, device=boxes.device) / size
    x, right, x_part = _between(corner[..., :1] + span[..., :1] * ticks, width)  # (B, R, M + 1)
    y, down, y_part = _between(corner[..., 1:] + span[..., 1:] * ticks, height)

    stride = (width + 1)[..., None, None]
    index = tables.starts.gather(1, matched)[..., None, None] + y[..., None] * stride + x[..., None, :]
    right, down = right[..., None], down[..., None] * stride
    here, beside, below = tables.sums[index], tables.sums[index + right], tables.sums[index + down]
    across = tables.sums[index + right + down] - below
    # Counts reach a million, where float32 steps by 0.06: so whole pixels are subtracted as integers, and only the
    # fractions of a row and a column (a thousand at most) as floats.
    x_part, y_part = x_part[..., None, :], y_part[..., None]
    beside, below = beside - here, below - here
    fraction = x_part * beside + y_part * below + x_part * y_part * (across - beside)
    covered = _difference(here) + _difference(fraction)
    area = (span[..., 0] * span[..., 1] / size**2)[..., None, None]
    return torch.where(area > 0, covered / area, 0.0).clamp(0, 1)


def mask_targets(tables: MaskTables, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """What the mask head learns: (B, R, M, M) float32, 1 in the cells that the mask covers at least by half.

    See `mask_coverage` for the arguments.
    """
    return (mask_coverage(tables, boxes, matched, size) >= 0.5).float()


def full_masks(tables: MaskTables, height: int, width: int) -> Tensor:
    """The masks in pixels of the resized image: (B, G, H, W) uint8, each pixel as the mask is at its centre.

    B x G full images: for drawing, for tests and for `mask_targets_torchvision`.
    """
    device = tables.sums.device
    rows, columns = tables.sizes[..., None].unbind(-2)  # (B, G, 1)
    scale_x, scale_y = tables.scales[:, None, :, None].unbind(-2)  # (B, 1, 1)
    origin_x, origin_y = tables.origins[..., None].unbind(-2)
    x = ((torch.arange(width, device=device) + 0.5) / scale_x - origin_x).floor().long()  # (B, G, W)
    y = ((torch.arange(height, device=device) + 0.5) / scale_y - origin_y).floor().long()
    inside = ((y >= 0) & (y < rows))[..., None] & ((x >= 0) & (x < columns))[..., None, :]
    stride = (columns + 1)[..., None]
    index = tables.starts[..., None, None] + y[..., None] * stride + x[..., None, :]
    index = torch.where(inside, index, 0)
    down = torch.where(inside, stride, 0)
    right = inside.long()
    sums = tables.sums
    lower, upper = sums[index + down + right] - sums[index + down], sums[index + right] - sums[index]
    return (lower - upper).to(torch.uint8)


def mask_targets_torchvision(
    tables: MaskTables, boxes: Tensor, matched: Tensor, size: int, height: int, width: int
) -> Tensor:
    """The targets of torchvision's `project_masks_on_boxes`: RoIAlign of the full mask, not rounded to 0 and 1.

    RoIAlign reads with scale 1, adaptive sampling and without the half-pixel shift. It needs B x G full masks in
    float32. See `mask_coverage` for the arguments; `height` and `width` are those of the resized image.

    Returns:
        (B, R, M, M) float32 in 0..1.
    """
    images, regions = matched.shape
    masks = full_masks(tables, height, width).float().reshape(-1, 1, height, width)
    objects = tables.starts.shape[1]
    first = objects * torch.arange(images, device=boxes.device)[:, None]
    rois = torch.cat(((matched + first)[..., None].to(boxes.dtype), boxes), dim=-1).reshape(-1, 5)
    aligned = roi_align(masks, rois, (size, size), spatial_scale=1.0, sampling_ratio=-1, aligned=False)
    return aligned.reshape(images, regions, size, size)
