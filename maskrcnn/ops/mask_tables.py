"""Masks of the ground truth: as summed-area tables, read inside any box as what the mask head learns.

Shapes: B images, R regions, G objects, H x W image, M mask side, T entries of all summed-area tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from maskrcnn.structures import MaskCrop, MaskTables

# Pixels of full masks that are made at once: each takes about 40 bytes on the way, so 2^23 take a third of a gigabyte.
PIXELS_AT_ONCE = 2**23


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

    RoIAlign reads with scale 1, adaptive sampling and without the half-pixel shift. It needs full masks in float32,
    of which `PIXELS_AT_ONCE` are held at a time. See `mask_coverage` for the arguments; `height` and `width` are those
    of the resized image.

    Returns:
        (B, R, M, M) float32 in 0..1.
    """
    number = tables.starts.shape[1]
    first = number * torch.arange(len(matched), device=boxes.device)[:, None]
    objects, owners = (matched + first).flatten().unique(return_inverse=True)  # (U,), (B * R,): index into them
    targets = boxes.new_zeros(owners.numel(), size, size)
    step = max(1, PIXELS_AT_ONCE // (height * width))
    for start in range(0, len(objects), step):
        masks = full_masks(_each_alone(tables, objects[start : start + step]), height, width).float()
        here = ((owners >= start) & (owners < start + step)).nonzero()[:, 0]
        rois = torch.cat(((owners[here] - start)[:, None].to(boxes.dtype), boxes.flatten(0, 1)[here]), dim=1)
        aligned = roi_align(masks, rois, (size, size), spatial_scale=1.0, sampling_ratio=-1, aligned=False)
        targets[here] = aligned[:, 0]
    return targets.view(*matched.shape, size, size)


def _each_alone(tables: MaskTables, objects: Tensor) -> MaskTables:
    """Each of `objects` (U,), numbered through the batch, as the only object of an image of its own."""
    return MaskTables(
        sums=tables.sums,
        starts=tables.starts.flatten()[objects, None],
        sizes=tables.sizes.flatten(0, 1)[objects, None],
        origins=tables.origins.flatten(0, 1)[objects, None],
        scales=tables.scales[objects // tables.starts.shape[1]],
    )
