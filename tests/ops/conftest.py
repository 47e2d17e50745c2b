"""Fixtures shared by the tests of the ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def random_boxes() -> Callable[[int, float, float], Tensor]:
    """Return a function that makes (count + 11, 4) boxes in and around an image; the last 11 are special cases."""

    def make(count: int, height: float, width: float) -> Tensor:
        centres = torch.rand(count, 2) * torch.tensor([width, height]) * 1.6 - torch.tensor([width, height]) * 0.3
        sides = torch.exp(torch.randn(count, 2)) * torch.tensor([width, height]) * 0.3
        special = [
            [0.0, 0.0, width, height],  # the whole image
            [5.0, 6.0, 6.0, 7.0],  # one pixel
            [9.0, 8.0, 9.0, 8.0],  # no area, inside
            [3.0, 4.0, 3.0, 20.0],  # no width
            [-500.0, -500.0, 900.0, 900.0],  # huge, mostly outside
            [width + 90, 0.0, width + 99, 9.0],  # outside, to the right
            [-99.0, -99.0, -90.0, -90.0],  # outside, above and to the left
            [-8.0, -8.0, 4.0, 4.0],  # partly outside, at the corner
            [-4.0, -4.0, -4.0, -4.0],  # sample points exactly one cell outside, at stride 4
            [width, height, width, height],  # sample points on the far border
            [width + 2, height + 2, width + 2, height + 2],  # the same at stride 4 with `aligned`
        ]
        return torch.cat((torch.cat((centres - sides / 2, centres + sides / 2), dim=1), torch.tensor(special)))

    return make


@pytest.fixture
def random_case(random_boxes: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return feature maps (2, 5, 9, 13) of two images at stride 4, boxes, and the image index of each box."""
    boxes = random_boxes(30, height=36.0, width=52.0)
    return torch.randn(2, 5, 9, 13), boxes, torch.randint(0, 2, (len(boxes),))
