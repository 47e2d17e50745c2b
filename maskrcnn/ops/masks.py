"""Predicted masks: paste them from their boxes into the image, or encode them as COCO RLE.

Shapes: D detections, H x W image, M mask side, C cells along a padded mask (M + 2), L pixels along an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PasteConvention = Literal["exact", "torchvision"]

# --- Pasting ---------------------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """Map from image pixels to mask cells along one axis, for D masks that are padded with one zero cell on each side.

    A pixel with its centre at `p` has the cell coordinate `(p - origin) * density + offset`. Integer coordinates are
    centres of cells, and 0 is the padding cell. Pixels outside `first <= pixel < stop` are not part of the mask.
    """

    first: Tensor  # (D,) int64, inside the image
    stop: Tensor  # (D,) int64, inside the image
    origin: Tensor  # (D,) pixels
    density: Tensor  # (D,) cells per pixel
    offset: float

    def read(self, mask: Tensor, pixel: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """Return the lower of the two cells between which `pixel` interpolates, and the weight 0..1 of the upper.

        `mask` (int64 indices into D) and `pixel` broadcast; `cells` is M.
        """
        cell = (pixel + 0.5 - self.origin[mask]) * self.density[mask] + self.offset
        cell = cell.clamp(0, cells + 1)
        lower = cell.floor().clamp(max=cells)
        return lower.long(), cell - lower


def _exact_axis(low: Tensor, high: Tensor, cells: int, length: int) -> _Axis:
    """Return the axis whose M cells fill the box. The mask has the pixels with centres in the closed box."""
    first = (low - 0.5).ceil()
    has_area = high > low
    stop = torch.where(has_area, (high - 0.5).floor() + 1, first)
    extent = torch.where(has_area, high - low, 1.0)
    return _Axis(first.clamp(0, length).long(), stop.clamp(0, length).long(), low, cells / extent, offset=0.5)


def _torchvision_axis(low: Tensor, high: Tensor, cells: int, length: int) -> _Axis:
    """Return the axis of torchvision: the box grows by one cell per side, then its ends are truncated to pixels."""
    centre = (high + low) * 0.5
    half = (high - low) * 0.5 * ((cells + 2) / cells)
    first = (centre - half).long()
    extent = ((centre + half).long() - first + 1).clamp(min=1)
    density = (cells + 2) / extent.to(low.dtype)
    return _Axis(first.clamp(0, length), (first + extent).clamp(0, length), first.to(low.dtype), density, offset=-0.5)


def _axes(masks: Tensor, boxes: Tensor, height: int, width: int, convention: PasteConvention) -> tuple[_Axis, _Axis]:
    """Return the vertical and the horizontal axis."""
    make_axis = _exact_axis if convention == "exact" else _torchvision_axis
    x1, y1, x2, y2 = boxes.float().unbind(1)
    return make_axis(y1, y2, masks.shape[-2], height), make_axis(x1, x2, masks.shape[-1], width)


def _interpolate(values: Tensor, axis: _Axis, length: int) -> Tensor:
    """Interpolate linearly at all pixels along the second dimension: (D, C, N) -> (D, length, N)."""
    mask = torch.arange(len(values), device=values.device)[:, None]
    pixel = torch.arange(length, device=values.device)
    lower, fraction = axis.read(mask, pixel, values.shape[1] - 2)
    inside = (pixel >= axis.first[:, None]) & (pixel < axis.stop[:, None])
    index = lower[..., None].expand(-1, -1, values.shape[2])
    lower_values = values.gather(1, index)
    upper_values = values.gather(1, index + 1)
    return (lower_values + (upper_values - lower_values) * fraction[..., None]) * inside[..., None]


def paste_probabilities(
    masks: Tensor, boxes: Tensor, height: int, width: int, convention: PasteConvention = "exact"
) -> Tensor:
    """Resize each mask to its box and interpolate it bilinearly at the pixel centres of the image.

    `exact` is the convention of Detectron2 (`grid_sample` with `align_corners=False` and zero padding) for pixels whose
    centre is inside the box, and 0 for the others. `torchvision` is the convention of `paste_masks_in_image`: the box
    grows by one mask cell per side and is truncated to whole pixels, which makes objects up to two pixels larger.

    Args:
        masks: (D, M, M) probabilities.
        boxes: (D, 4) in pixels of the image.
        height: H.
        width: W.
        convention: see above.

    Returns:
        (D, H, W) float32 probabilities.
    """
    rows, columns = _axes(masks, boxes, height, width, convention)
    padded = F.pad(masks.float(), (1, 1, 1, 1))
    interpolated_rows = _interpolate(padded, rows, height)  # (D, C, C) -> (D, H, C)
    return _interpolate(interpolated_rows.mT, columns, width).mT  # (D, H, C) -> (D, H, W)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    convention: PasteConvention = "exact",
) -> Tensor:
    """Return the binary masks in the image, (D, H, W) bool: True where the probability is at least `threshold`.

    Example: with `exact`, a mask of ones in the box (10, 10, 20, 20) covers 100 pixels. See `paste_probabilities` for
    the arguments.
    """
    assert threshold > 0, "outside the boxes the probability is 0"
    return paste_probabilities(masks, boxes, height, width, convention) >= threshold


# --- Run-length encoding ---------------------------------------------------------------------------------------------


def encode_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    convention: PasteConvention = "exact",
) -> list[dict]:
    """Return the result of `paste_masks` as COCO's compressed RLE, without creating full-size masks.

    Only the pixels inside the box are interpolated; the run lengths follow from the transitions between 0 and 1. See
    `paste_probabilities` for the arguments.

    Returns:
        For each of D masks `{"size": [height, width], "counts": text}`.
    """
    assert threshold > 0, "outside the boxes the probability is 0"
    masks, boxes = masks.detach().float().cpu(), boxes.detach().cpu()
    if len(masks) == 0:
        return []
    rows, columns = _axes(masks, boxes, height, width, convention)
    # COCO counts pixels column by column, so the masks are transposed and every crop is (width, height).
    padded = F.pad(masks.mT, (1, 1, 1, 1)).numpy()
    row_cells, column_cells = _cells_in_boxes(rows, masks.shape[-2]), _cells_in_boxes(columns, masks.shape[-1])
    crops = (_crop(*arguments) for arguments in zip(padded, row_cells, column_cells, strict=True))
    transitions = [_transitions(crop >= threshold) for crop in crops]
    edges, mask = _edges(transitions, rows, columns, height)
    texts = _compress(*_run_lengths(edges, np.bincount(mask, minlength=len(masks)), height * width))
    return [{"size": [height, width], "counts": text} for text in texts]


def _cells_in_boxes(axis: _Axis, cells: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `axis.read` for the pixels inside each box: D pairs (lower cell, fraction), each (L,)."""
    lengths = axis.stop - axis.first
    ends = lengths.cumsum(0)
    mask = torch.repeat_interleave(lengths)
    pixel = torch.arange(len(mask)) - (ends - lengths - axis.first)[mask]
    lower, fraction = (tensor.numpy() for tensor in axis.read(mask, pixel, cells))
    spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    return [(lower[start:end], fraction[start:end]) for start, end in spans]


def _crop(
    padded: np.ndarray, vertical: tuple[np.ndarray, np.ndarray], horizontal: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Interpolate one transposed, padded mask (C, C) at the pixels of its box: the crop, (width, height).

    The operations are the same as in `_interpolate`, in the same order, so that both give identical bits.
    """
    lower, fraction = vertical
    interpolated_rows = padded.take(lower, axis=1) + np.diff(padded, axis=1).take(lower, axis=1) * fraction
    lower, fraction = horizontal
    crop = np.diff(interpolated_rows, axis=0).take(lower, axis=0)
    crop *= fraction[:, None]
    crop += interpolated_rows.take(lower, axis=0)
    return crop


def _transitions(covered: np.ndarray) -> np.ndarray:
    """Return the column-major positions at which runs of ones in a crop (width, height) begin and end.

    A zero before the first column and one after each column terminate every run, so positions count columns of
    `height + 1` pixels.
    """
    columns, rows = covered.shape
    padded = np.zeros(1 + columns * (rows + 1), dtype=bool)
    padded[1:].reshape(columns, rows + 1)[:, :rows] = covered
    return np.flatnonzero(padded[1:] != padded[:-1])


def _edges(
    transitions: Sequence[np.ndarray], rows: _Axis, columns: _Axis, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the column-major positions in the image at which runs begin and end, and the mask index of each."""
    mask = np.arange(len(transitions)).repeat([len(positions) for positions in transitions])
    top, left = rows.first.numpy()[mask], columns.first.numpy()[mask]
    crop_height = (rows.stop - rows.first).numpy()[mask]
    column, row = np.divmod(np.concatenate(transitions), crop_height + 1)
    edges = (left + column) * height + top + row
    # If a crop is as high as the image, a run can continue from the bottom of a column at the top of the next one.
    first = np.flatnonzero((edges[1:] == edges[:-1]) & (mask[1:] == mask[:-1]))
    duplicates = np.concatenate((first, first + 1))
    return np.delete(edges, duplicates), np.delete(mask, duplicates)


def _run_lengths(edges: np.ndarray, edges_of_mask: np.ndarray, area: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of the runs of 0, 1, 0, ... of all masks, concatenated, and the number per mask (D,)."""
    ends = np.cumsum(edges_of_mask + 2)  # each mask has a 0 before its edges and `area` after them
    padded = np.zeros(ends[-1], dtype=np.int64)
    padded[ends - 1] = area
    is_edge = np.ones(len(padded), dtype=bool)
    is_edge[ends - 1] = is_edge[ends - edges_of_mask - 2] = False
    padded[is_edge] = edges
    runs = np.diff(padded)
    has_last_run = runs[ends - 2] > 0  # False if the mask covers the last pixel
    is_run = np.ones(len(runs), dtype=bool)
    is_run[ends[:-1] - 1] = False  # difference between two masks
    is_run[ends - 2] = has_last_run
    return runs[is_run], edges_of_mask + has_last_run


def _compress(counts: np.ndarray, runs_of_mask: np.ndarray) -> list[str]:
    """Return COCO's compressed text of the run lengths of all masks (`rleToString` of cocoapi).

    From the fourth on, a length is stored as the difference from the length two before. A number is written in groups
    of five bits, lowest first, in two's complement. Bit 5 is set if more groups follow. Adding 48 gives a printable
    character.
    """
    starts = runs_of_mask.cumsum() - runs_of_mask
    as_difference = np.flatnonzero(np.arange(len(counts)) - starts.repeat(runs_of_mask) > 2)
    rest = counts.copy()
    rest[as_difference] -= counts[as_difference - 2]
    characters = np.zeros((len(counts), 7), dtype=np.uint8)  # 35 bits: enough for 2**34 pixels
    unfinished = np.arange(len(counts))  # indices of the numbers with groups left to write
    for group in range(characters.shape[1]):
        low, rest = rest & 31, rest >> 5
        more = rest != -(low >> 4)  # bit 4 of the last group is the sign
        characters[unfinished, group] = low + 32 * more + 48
        unfinished, rest = unfinished[more], rest[more]
    is_written = characters > 0
    text = characters[is_written].tobytes().decode("ascii")
    ends = np.add.reduceat(is_written.sum(axis=1), starts).cumsum().tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
