"""Ground-truth masks as summed-area tables, and the mask targets computed from them.

Shapes: B images, R regions, G objects, H x W image, M mask side, T entries of all summed-area tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from maskrcnn.ops import cpu
from maskrcnn.structures import AxisAlignedMap, MaskCrop, MaskTables

# Pixels of full masks per chunk: each needs about 40 bytes of temporary memory, so 2^23 need a third of a gigabyte.
PIXELS_AT_ONCE = 2**23


def table_entries(crops: Sequence[Sequence[MaskCrop]]) -> int:
    """Return T, the number of entries of the tables of these masks."""
    sizes = (crop.pixels.shape for image in crops for crop in image)
    return 1 + sum((height + 1) * (width + 1) for height, width in sizes)


def tabulate(
    crops: Sequence[Sequence[MaskCrop]],
    maps: Sequence[AxisAlignedMap],
    objects_per_image: int,
    entries: int | None = None,
) -> MaskTables:
    """Return the masks of a batch as summed-area tables.

    Args:
        crops: the masks of each of B images, at most `objects_per_image` per image.
        maps: from annotated pixels to those of the transformed image, for each image.
        objects_per_image: G, at least 1; images with fewer objects are padded.
        entries: T, at least `table_entries(crops)`, which is the default; padded with zeros.
    """
    sizes = np.zeros((len(crops), objects_per_image, 2), dtype=np.int64)
    origins = np.zeros((len(crops), objects_per_image, 2), dtype=np.float32)
    starts = np.zeros((len(crops), objects_per_image), dtype=np.int64)
    tables = [np.zeros(1, dtype=np.int32)]  # the entry that padding reads; T is never 0
    end = 1
    scales = np.array([(each.scale_x, each.scale_y) for each in maps], dtype=np.float64).reshape(-1, 2)
    offsets = np.array([(each.offset_x, each.offset_y) for each in maps], dtype=np.float64).reshape(-1, 2) / scales
    for b, image in enumerate(crops):
        assert len(image) <= objects_per_image, f"{len(image)} masks, but objects_per_image is {objects_per_image}"
        for g, crop in enumerate(image):
            sizes[b, g], origins[b, g], starts[b, g] = crop.pixels.shape, offsets[b] + (crop.x, crop.y), end
            tables.append(summed_area(crop.pixels).ravel())
            end += tables[-1].size
    tables.append(np.zeros((entries or end) - end, dtype=np.int32))
    return MaskTables(
        sums=torch.from_numpy(np.concatenate(tables)),
        starts=torch.from_numpy(starts),
        sizes=torch.from_numpy(sizes),
        origins=torch.from_numpy(origins),
        scales=torch.from_numpy(scales.astype(np.float32)),
    )


def summed_area(pixels: np.ndarray) -> np.ndarray:
    """Return the summed-area table of a binary mask: (h, w) -> (h + 1, w + 1) int32."""
    table = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1), dtype=np.int32)
    np.cumsum(pixels, axis=0, dtype=np.int32, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    return table


def _difference(corners: Tensor) -> Tensor:
    """Return the sums over the cells of a grid from the cumulative sums at its corners: M + 1 -> M, both axes."""
    return corners.diff(dim=-1).diff(dim=-2)


def _neighbours(coordinate: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lower table index of coordinates clamped to 0..limit, the step to the upper, and its weight."""
    coordinate = coordinate.clamp(min=0).minimum(limit[..., None])
    lower = coordinate.floor().long().minimum(limit[..., None] - 1).clamp(min=0)
    return lower, (limit > 0).long()[..., None], coordinate - lower


def mask_coverage(tables: MaskTables, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """Return the fraction of each cell of an M x M grid in a box that the mask of the matched object covers.

    The result is exact up to rounding: the cumulative area is bilinear between the entries of a summed-area table, so
    four bilinear look-ups give the covered area of a cell of any size.

    Args:
        tables: masks of the batch.
        boxes: (B, R, 4) in pixels of the resized image.
        matched: (B, R) int64, index of the matched object of each box.
        size: M.

    Returns:
        (B, R, M, M) float32 in 0..1; 0 for boxes without area and for objects without a mask.
    """
    height, width = tables.sizes.gather(1, matched[..., None].expand(-1, -1, 2)).unbind(-1)  # (B, R)
    origin = tables.origins.gather(1, matched[..., None].expand(-1, -1, 2))
    scale = tables.scales[:, None]
    corner = boxes[..., :2] / scale - origin  # in pixels of the object's table
    span = ((boxes[..., 2:] - boxes[..., :2]) / scale).clamp(min=0)
    grid = torch.arange(size + 1, device=boxes.device) / size
    x, right, x_fraction = _neighbours(corner[..., :1] + span[..., :1] * grid, width)  # (B, R, M + 1)
    y, down, y_fraction = _neighbours(corner[..., 1:] + span[..., 1:] * grid, height)

    stride = (width + 1)[..., None, None]
    index = tables.starts.gather(1, matched)[..., None, None] + y[..., None] * stride + x[..., None, :]
    right, down = right[..., None], down[..., None] * stride
    top_left, bottom_left = tables.sums[index], tables.sums[index + down]
    top_difference = tables.sums[index + right] - top_left
    bottom_difference = tables.sums[index + right + down] - bottom_left
    left_difference = bottom_left - top_left
    # Sums reach a million, where float32 has a spacing of 0.06. Therefore whole pixels are subtracted as integers, and
    # only the fractions of a row and a column (at most about a thousand) as floats.
    x_fraction, y_fraction = x_fraction[..., None, :], y_fraction[..., None]
    fraction = (
        x_fraction * top_difference
        + y_fraction * left_difference
        + x_fraction * y_fraction * (bottom_difference - top_difference)
    )
    covered = _difference(top_left) + _difference(fraction)
    area = (span[..., 0] * span[..., 1] / size**2)[..., None, None]
    return torch.where(area > 0, covered / area, 0.0).clamp(0, 1)


def mask_targets(tables: MaskTables, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """Return binary mask targets: (B, R, M, M) float32, 1 for cells of which the mask covers at least half, else 0.

    See `mask_coverage` for the arguments.
    """
    return (mask_coverage(tables, boxes, matched, size) >= 0.5).float()


def full_masks(tables: MaskTables, height: int, width: int) -> Tensor:
    """Return the masks in pixels of the resized image, (B, G, H, W) uint8, sampled at the pixel centres.

    This needs memory for B x G full-size masks. It is for drawing, tests and `mask_targets_torchvision`.
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
    """Return the targets of torchvision's `project_masks_on_boxes`: RoIAlign of the full mask, not binarised.

    RoIAlign uses scale 1, adaptive sampling and `aligned=False`. It needs full float32 masks, which are created in
    chunks of `PIXELS_AT_ONCE` pixels. See `mask_coverage` for the other arguments.

    Args:
        tables, boxes, matched, size: as in `mask_coverage`.
        height: H of the resized image.
        width: W of the resized image.

    Returns:
        (B, R, M, M) float32 in 0..1.
    """
    align = _align_matched_masks if cpu.takes_short_cuts(boxes) else _align_all_masks
    return align(tables, boxes, matched, size, height, width)


def _align_matched_masks(
    tables: MaskTables, boxes: Tensor, matched: Tensor, size: int, height: int, width: int
) -> Tensor:
    """Return `mask_targets_torchvision` from the masks of the matched objects alone."""
    objects_per_image = tables.starts.shape[1]
    offset = objects_per_image * torch.arange(len(matched), device=boxes.device)[:, None]
    # (U,) indices into the B * G objects, and (B * R,) indices into U.
    objects, object_of_box = (matched + offset).flatten().unique(return_inverse=True)
    targets = boxes.new_zeros(object_of_box.numel(), size, size)
    step = max(1, PIXELS_AT_ONCE // (height * width))
    for start in range(0, len(objects), step):
        masks = full_masks(_one_object_per_image(tables, objects[start : start + step]), height, width).float()
        in_chunk = ((object_of_box >= start) & (object_of_box < start + step)).nonzero()[:, 0]
        mask_index = (object_of_box[in_chunk] - start)[:, None].to(boxes.dtype)
        rois = torch.cat((mask_index, boxes.flatten(0, 1)[in_chunk]), dim=1)
        aligned = roi_align(masks, rois, (size, size), spatial_scale=1.0, sampling_ratio=-1, aligned=False)
        targets[in_chunk] = aligned[:, 0]
    return targets.view(*matched.shape, size, size)


def _align_all_masks(tables: MaskTables, boxes: Tensor, matched: Tensor, size: int, height: int, width: int) -> Tensor:
    """Return `mask_targets_torchvision` from the masks of all objects, so that shapes do not depend on the matches."""
    batch, objects_per_image = tables.starts.shape
    images = torch.arange(batch, device=boxes.device)[:, None]
    targets = boxes.new_zeros(*matched.shape, size, size)
    step = max(1, PIXELS_AT_ONCE // (batch * height * width))
    for start in range(0, objects_per_image, step):
        part = slice(start, min(start + step, objects_per_image))
        chunk = MaskTables(
            tables.sums, tables.starts[:, part], tables.sizes[:, part], tables.origins[:, part], tables.scales
        )
        masks = full_masks(chunk, height, width).float().flatten(0, 1)[:, None]  # (B * objects, 1, H, W)
        in_chunk = (matched >= part.start) & (matched < part.stop)
        index = images * (part.stop - part.start) + torch.where(in_chunk, matched - part.start, 0)
        moved = torch.where(in_chunk[..., None], boxes, 0)  # the others without area: they cost nothing
        rois = torch.cat((index[..., None].to(boxes.dtype), moved), dim=-1).flatten(0, 1)
        aligned = roi_align(masks, rois, (size, size), spatial_scale=1.0, sampling_ratio=-1, aligned=False)
        targets = torch.where(in_chunk[..., None, None], aligned.view_as(targets), targets)
    return targets


def _one_object_per_image(tables: MaskTables, objects: Tensor) -> MaskTables:
    """Return tables of U images with one object each; `objects` (U,) are indices into the B * G objects."""
    return MaskTables(
        sums=tables.sums,
        starts=tables.starts.flatten()[objects, None],
        sizes=tables.sizes.flatten(0, 1)[objects, None],
        origins=tables.origins.flatten(0, 1)[objects, None],
        scales=tables.scales[objects // tables.starts.shape[1]],
    )
