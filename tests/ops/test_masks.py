"""Pasting compared with `grid_sample` and torchvision, RLE compared with pycocotools.

Shapes: D detections, H x W image, M mask side.
"""

from __future__ import annotations

import numpy as np
import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskrcnn.ops.masks import encode_masks, paste_masks, paste_probabilities

HEIGHT, WIDTH = 37, 53


def random_boxes(count: int, height: int, width: int) -> Tensor:
    """Return (count, 4) boxes inside an image, from less than one pixel to the whole image in size."""
    ends = torch.rand(count, 2, 2).sort(dim=1).values * torch.tensor([width, height])
    return ends.reshape(count, 4)


# --- Pasting ---------------------------------------------------------------------------------------------------------


def test_ones_fill_exactly_their_box() -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 10.0, 20.0, 20.0]]), 30, 40)[0]
    assert pasted.sum() == 100
    assert pasted[10:20, 10:20].all()


def test_ones_fill_the_pixels_whose_centres_are_inside() -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.3, 10.3, 20.6, 20.6]]), 30, 40)[0]
    assert pasted.sum() == 121
    assert pasted[10:21, 10:21].all()


def test_values_are_interpolated_between_cell_centres() -> None:
    # Four pixels over two cells: the pixel centres have the cell coordinates -0.25, 0.25, 0.75, 1.25.
    mask = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    probabilities = paste_probabilities(mask, torch.tensor([[1.0, 0.0, 5.0, 2.0]]), 2, 6)
    torch.testing.assert_close(probabilities[0, 0], torch.tensor([0.0, 0.0, 0.25, 0.75, 0.75, 0.0]))


def test_pasting_is_grid_sample_at_pixel_centres() -> None:
    masks, boxes = torch.rand(50, 9, 9), random_boxes(50, HEIGHT, WIDTH) * 1.4 - 8
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    centres = torch.stack((x, y), dim=-1)
    low, high = boxes[:, None, None, :2], boxes[:, None, None, 2:]
    grid = (centres - low) / (high - low) * 2 - 1
    expected = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    inside = ((centres > low) & (centres < high)).all(dim=-1)
    probabilities = paste_probabilities(masks, boxes, HEIGHT, WIDTH)
    torch.testing.assert_close(probabilities, expected * inside, atol=1e-4, rtol=0)
    assert inside.any()


@pytest.mark.parametrize("size", [14, 28])
def test_torchvision_convention_is_torchvisions(size: int) -> None:
    masks, boxes = torch.rand(40, size, size), random_boxes(40, HEIGHT, WIDTH)
    expected = paste_masks_in_image(masks[:, None], boxes, (HEIGHT, WIDTH))[:, 0]
    probabilities = paste_probabilities(masks, boxes, HEIGHT, WIDTH, "torchvision")
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    pasted = paste_masks(masks, boxes, HEIGHT, WIDTH, convention="torchvision")
    assert torch.equal(pasted, expected >= 0.5)


def test_torchvision_convention_adds_a_border() -> None:
    box = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    assert paste_masks(torch.ones(1, 28, 28), box, 30, 40, convention="torchvision").sum() == 144


# --- RLE -------------------------------------------------------------------------------------------------------------


def reference_encoding(masks: Tensor, boxes: Tensor, height: int, width: int, **options) -> list[dict]:
    pasted = paste_masks(masks, boxes, height, width, **options).numpy().astype(np.uint8)
    encoded = [pycocotools.mask.encode(np.asfortranarray(mask)) for mask in pasted]
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]


SPECIAL_BOXES = {
    "partly outside": [[-8.3, -5.1, 12.7, 9.9], [40.2, 20.0, 70.0, 60.0]],
    "wholly outside": [[-20.0, 3.0, -2.0, 9.0], [60.0, 3.0, 70.0, 9.0]],
    "whole image": [[0.0, 0.0, WIDTH, HEIGHT], [-5.0, -5.0, WIDTH + 5.0, HEIGHT + 5.0]],
    "full height": [[11.2, 0.0, 30.8, HEIGHT], [0.0, -3.0, 9.0, HEIGHT + 3.0]],
    "full width": [[0.0, 4.4, WIDTH, 20.1], [0.0, HEIGHT - 1.0, WIDTH, HEIGHT]],
    "one pixel": [[7.0, 9.0, 8.0, 10.0], [WIDTH - 1.0, HEIGHT - 1.0, WIDTH, HEIGHT]],
    "between pixel centres": [[7.6, 9.6, 8.4, 10.4], [7.6, 0.0, 8.4, HEIGHT]],
    "no area": [[7.5, 9.5, 7.5, 9.5], [3.0, 4.0, 20.0, 4.0]],
    "half pixels": [[10.5, 10.5, 20.5, 20.5], [0.5, 0.5, 1.5, 36.5]],
}


@pytest.mark.parametrize("convention", ["exact", "torchvision"])
@pytest.mark.parametrize("name", SPECIAL_BOXES)
@pytest.mark.parametrize("fill", ["zeros", "ones", "noise", "binary noise"])
def test_encoding_of_special_boxes(name: str, fill: str, convention: str) -> None:
    boxes = torch.tensor(SPECIAL_BOXES[name])
    noise = torch.rand(len(boxes), 14, 14)
    fills = {"zeros": noise * 0, "ones": noise * 0 + 1, "noise": noise, "binary noise": noise.round()}
    masks = fills[fill]
    encoded = encode_masks(masks, boxes, HEIGHT, WIDTH, convention=convention)
    assert encoded == reference_encoding(masks, boxes, HEIGHT, WIDTH, convention=convention)


@pytest.mark.parametrize("convention", ["exact", "torchvision"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (97, 131)])
def test_encoding_of_random_masks(height: int, width: int, convention: str) -> None:
    masks = torch.cat((torch.rand(150, 28, 28), torch.rand(150, 28, 28).round()))
    boxes = random_boxes(300, height, width) * 1.5 - 0.2 * torch.tensor([width, height, width, height])
    boxes[::3] = boxes[::3].round()
    encoded = encode_masks(masks, boxes, height, width, convention=convention)
    assert encoded == reference_encoding(masks, boxes, height, width, convention=convention)


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.9])
def test_encoding_at_other_thresholds(threshold: float) -> None:
    masks, boxes = torch.rand(20, 7, 7), random_boxes(20, HEIGHT, WIDTH)
    encoded = encode_masks(masks, boxes, HEIGHT, WIDTH, threshold)
    assert encoded == reference_encoding(masks, boxes, HEIGHT, WIDTH, threshold=threshold)


def test_encoding_by_hand() -> None:
    # 3 x 4 image, columns 1 and 2 covered: 3 zeros, 6 ones, 3 zeros. Each length is one digit.
    encoded = encode_masks(torch.ones(1, 4, 4), torch.tensor([[1.0, 0.0, 3.0, 3.0]]), 3, 4)
    assert encoded == [{"size": [3, 4], "counts": "363"}]


def test_long_runs_take_several_characters() -> None:
    boxes = torch.tensor([[1900.0, 1900.0, 1901.0, 1901.0], [0.0, 0.0, 2000.0, 2000.0]])
    encoded = encode_masks(torch.ones(2, 4, 4), boxes, 2000, 2000)
    assert encoded == reference_encoding(torch.ones(2, 4, 4), boxes, 2000, 2000)


def test_no_masks() -> None:
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 12) == []
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 12).shape == (0, 10, 12)
