"""Mask coverage compared with slow loops, full masks with their crops, torchvision's targets with torchvision.

Shapes: B images, R regions, G objects, H x W image, M mask side.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from maskrcnn.ops import mask_tables
from maskrcnn.ops.mask_tables import full_masks, mask_coverage, mask_targets, mask_targets_torchvision, tabulate
from maskrcnn.ops.masks import paste_masks
from maskrcnn.structures import AxisAlignedMap, MaskCrop, MaskTables


def random_boxes(count: int, height: int, width: int) -> Tensor:
    """Return (count, 4) boxes inside an image, from less than one pixel to the whole image in size."""
    ends = torch.rand(count, 2, 2).sort(dim=1).values * torch.tensor([width, height])
    return ends.reshape(count, 4)


def square(side: int = 2, x: int = 1, y: int = 1) -> MaskCrop:
    return MaskCrop(x, y, np.ones((side, side), dtype=np.uint8))


def random_crop(generator: np.random.Generator, height: int, width: int) -> MaskCrop:
    h, w = generator.integers(1, height), generator.integers(1, width)
    x, y = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
    return MaskCrop(int(x), int(y), generator.integers(0, 2, (h, w), dtype=np.uint8))


def random_batch() -> tuple[MaskTables, list[list[MaskCrop]], Tensor, Tensor]:
    """Return tables of two images with four objects and one object, their crops, 12 boxes per image, and matches."""
    generator = np.random.default_rng(0)
    crops = [[random_crop(generator, 30, 40) for _ in range(4)], [random_crop(generator, 30, 40)]]
    tables = tabulate(crops, [AxisAlignedMap(1.6, 1.5), AxisAlignedMap(0.75, 0.8)], objects_per_image=4)
    boxes = random_boxes(24, 48, 64).reshape(2, 12, 4) - 3
    matched = torch.stack((torch.arange(12) % 4, torch.zeros(12, dtype=torch.int64)))
    return tables, crops, boxes, matched


def overlap(low: float, high: float, cells: int, first: int, length: int) -> np.ndarray:
    """Return the overlap, (cells, length), of the cells of `low..high` with the pixels `first..first + length`."""
    ends = np.linspace(low, high, cells + 1)
    pixels = np.arange(first, first + length)
    return np.minimum(ends[1:, None], pixels + 1).clip(pixels) - np.maximum(ends[:-1, None], pixels).clip(
        max=pixels + 1
    )


def slow_coverage(crop: MaskCrop, box: np.ndarray, scale: tuple[float, float], size: int) -> np.ndarray:
    x1, y1, x2, y2 = box.astype(np.float64) / [*scale, *scale]
    rows = overlap(y1, y2, size, crop.y, crop.pixels.shape[0])
    columns = overlap(x1, x2, size, crop.x, crop.pixels.shape[1])
    return rows @ crop.pixels @ columns.T / ((x2 - x1) * (y2 - y1) / size**2)


def test_coverage_by_hand() -> None:
    tables = tabulate([[square()]], [AxisAlignedMap()], 1)
    boxes = torch.tensor([[[1.0, 1, 3, 3], [0, 0, 4, 4], [0, 0, 2, 2], [0.5, 1, 2.5, 3], [5, 5, 9, 9]]])
    coverage = mask_coverage(tables, boxes, torch.zeros(1, 5, dtype=torch.int64), 2)[0]
    assert coverage.tolist() == [
        [[1.0, 1.0], [1.0, 1.0]],
        [[0.25, 0.25], [0.25, 0.25]],
        [[0.0, 0.0], [0.0, 1.0]],
        [[0.5, 1.0], [0.5, 1.0]],
        [[0.0, 0.0], [0.0, 0.0]],
    ]


def test_coverage_of_a_resized_image() -> None:
    # Twice as wide, three times as high: the square at (1, 1, 3, 3) is at (2, 3, 6, 9).
    tables = tabulate([[square()]], [AxisAlignedMap(2.0, 3.0)], 1)
    coverage = mask_coverage(tables, torch.tensor([[[2.0, 3, 6, 9]]]), torch.zeros(1, 1, dtype=torch.int64), 7)
    torch.testing.assert_close(coverage, torch.ones(1, 1, 7, 7))


def test_coverage_is_the_area_of_overlap() -> None:
    tables, crops, boxes, matched = random_batch()
    coverage = mask_coverage(tables, boxes, matched, 7)
    scales = tables.scales.tolist()
    for b in range(2):
        for r in range(12):
            expected = slow_coverage(crops[b][matched[b, r]], boxes[b, r].numpy(), scales[b], 7)
            np.testing.assert_allclose(coverage[b, r], expected, atol=2e-4)


def test_coverage_is_the_mean_of_a_finely_sampled_mask() -> None:
    tables, _, boxes, matched = random_batch()
    coverage = mask_coverage(tables, boxes, matched, 4)
    fine = sampled_coverage(tables, boxes, matched, 4, samples=25)
    torch.testing.assert_close(coverage, fine, atol=0.05, rtol=0)


def sampled_coverage(tables: MaskTables, boxes: Tensor, matched: Tensor, size: int, samples: int) -> Tensor:
    """Return the mean of the mask at samples x samples points of each cell."""
    full = full_masks(MaskTables(tables.sums, tables.starts, tables.sizes, tables.origins, torch.ones(2, 2)), 30, 40)
    result = torch.zeros(*matched.shape, size, size)
    for b, r in np.ndindex(*matched.shape):
        low, high = boxes[b, r, :2] / tables.scales[b], boxes[b, r, 2:] / tables.scales[b]
        points = low + (high - low) * ((torch.arange(size * samples) + 0.5) / (size * samples))[:, None]
        x, y = points.floor().long().unbind(1)
        inside = ((y >= 0) & (y < 30))[:, None] & ((x >= 0) & (x < 40))
        values = full[b, matched[b, r]][y.clamp(0, 29)[:, None], x.clamp(0, 39)] * inside
        result[b, r] = values.float().reshape(size, samples, size, samples).mean(dim=(1, 3))
    return result


def test_coverage_of_a_large_mask_keeps_its_precision() -> None:
    # Two million pixels: float32 sums of this size have a spacing of 0.125.
    tables = tabulate([[MaskCrop(3, 2, np.ones((1500, 1400), dtype=np.uint8))]], [AxisAlignedMap()], 1)
    boxes = torch.tensor([[[1200.3, 1400.7, 1215.1, 1420.2], [3.0, 2.0, 1403.0, 1502.0]]])
    coverage = mask_coverage(tables, boxes, torch.zeros(1, 2, dtype=torch.int64), 28)
    torch.testing.assert_close(coverage, torch.ones_like(coverage), atol=2e-3, rtol=0)


def test_no_coverage_without_area_mask_or_object() -> None:
    maskless = MaskCrop(2, 2, np.zeros((0, 0), dtype=np.uint8))
    tables = tabulate([[maskless], []], [AxisAlignedMap(), AxisAlignedMap()], 2)
    boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 1, 1], [3, 3, 2, 2]]).expand(2, 3, 4)
    coverage = mask_coverage(tables, boxes, torch.tensor([[0, 1, 0], [1, 0, 0]]), 3)
    assert torch.equal(coverage, torch.zeros(2, 3, 3, 3))
    solid = tabulate([[square(9)], [square(9)]], [AxisAlignedMap(), AxisAlignedMap()], 1)
    coverage = mask_coverage(solid, boxes[:, 1:], torch.zeros(2, 2, dtype=torch.int64), 3)
    assert torch.equal(coverage, torch.zeros(2, 2, 3, 3))


def test_no_images_and_no_boxes() -> None:
    tables = tabulate([[], []], [AxisAlignedMap(), AxisAlignedMap()], 1)
    assert mask_targets(tables, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), 28).shape == (
        (2, 0, 28, 28)
    )
    assert tabulate([], [], 1).starts.shape == (0, 1)


def test_targets_are_one_from_half_coverage_on() -> None:
    tables = tabulate([[square()]], [AxisAlignedMap()], 1)
    boxes = torch.tensor([[[0.5, 1.0, 2.5, 3.0], [0.4, 1.0, 2.4, 3.0]]])
    targets = mask_targets(tables, boxes, torch.zeros(1, 2, dtype=torch.int64), 2)[0]
    assert targets.tolist() == [[[1.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]


def test_pasting_inverts_mask_targets() -> None:
    generator = np.random.default_rng(1)
    crop = MaskCrop(5, 4, generator.integers(0, 2, (28, 28), dtype=np.uint8))
    box = torch.tensor([[[5.0, 4.0, 33.0, 32.0]]])
    targets = mask_targets(tabulate([[crop]], [AxisAlignedMap()], 1), box, torch.zeros(1, 1, dtype=torch.int64), 28)
    pasted = paste_masks(targets[0], box[0], 40, 40)[0, 4:32, 5:33]
    assert torch.equal(pasted, torch.from_numpy(crop.pixels).bool())


def test_full_masks_place_the_crops() -> None:
    generator = np.random.default_rng(2)
    crops = [random_crop(generator, 30, 40) for _ in range(3)]
    masks = full_masks(tabulate([crops, []], [AxisAlignedMap(), AxisAlignedMap()], 4), 32, 44)
    assert masks.shape == (2, 4, 32, 44)
    assert masks.dtype == torch.uint8
    for mask, crop in zip(masks[0], crops, strict=False):
        expected = np.zeros((32, 44), dtype=np.uint8)
        height, width = crop.pixels.shape
        expected[crop.y : crop.y + height, crop.x : crop.x + width] = crop.pixels
        assert np.array_equal(mask.numpy(), expected)
    assert not masks[0, 3].any()
    assert not masks[1].any()


def test_full_masks_of_a_resized_image() -> None:
    masks = full_masks(tabulate([[square()]], [AxisAlignedMap(2.0, 3.0)], 1), 12, 8)[0, 0]
    assert masks.sum() == 4 * 6
    assert masks[3:9, 2:6].all()


def test_full_masks_of_a_shrunken_image_are_read_at_pixel_centres() -> None:
    dots = MaskCrop(0, 0, np.tile(np.array([[0, 0], [0, 1]], dtype=np.uint8), (2, 2)))
    masks = full_masks(tabulate([[dots]], [AxisAlignedMap(0.5, 0.5)], 1), 2, 2)
    assert masks.tolist() == [[[[1, 1], [1, 1]]]]


@pytest.mark.parametrize("masks_at_once", [100, 2])
def test_torchvisions_targets(monkeypatch: pytest.MonkeyPatch, masks_at_once: int) -> None:
    """Full masks are created in chunks: those of 2,000 objects would need 80 GB."""
    monkeypatch.setattr(mask_tables, "PIXELS_AT_ONCE", masks_at_once * 50 * 66)
    tables, _, boxes, matched = random_batch()
    targets = mask_targets_torchvision(tables, boxes, matched, 14, 50, 66)
    masks = full_masks(tables, 50, 66)
    for b in range(2):
        expected = project_masks_on_boxes(masks[b], boxes[b], matched[b], 14)
        torch.testing.assert_close(targets[b], expected)
    assert mask_targets_torchvision(tables, boxes[:, :0], matched[:, :0], 14, 50, 66).shape == (2, 0, 14, 14)
