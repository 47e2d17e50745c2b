"""RoI layers against numbers worked by hand, a slow loop in float64, and torchvision's kernels.

Shapes: B images, C channels, H and W of a feature map, R regions, S size of the grid, N sample points a bin and axis.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from maskrcnn.ops.roi import RoIAlignConfig, RoIConfig, RoIPoolConfig, RoIPooler, roi_align, roi_pool

CHOICES = [
    RoIPoolConfig(),
    RoIAlignConfig(),
    RoIAlignConfig(aligned=False, sampling_ratio=3),
    RoIAlignConfig(sampling_ratio=0),
    RoIAlignConfig(aggregate="maximum"),
    RoIAlignConfig(aggregate="maximum", sampling_ratio=1, aligned=False),
]
FIRST = torch.zeros(1, dtype=torch.int64)
MEMORY = [torch.contiguous_format, torch.channels_last]


def every_choice() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", CHOICES, ids=str)


def random_boxes(count: int, height: float, width: float) -> Tensor:
    """Boxes in and around an image of height x width pixels, and the awkward ones: see the comments."""
    centres = torch.rand(count, 2) * torch.tensor([width, height]) * 1.6 - torch.tensor([width, height]) * 0.3
    sides = torch.exp(torch.randn(count, 2)) * torch.tensor([width, height]) * 0.3
    awkward = [
        [0.0, 0.0, width, height],  # the whole image
        [5.0, 6.0, 6.0, 7.0],  # one pixel
        [9.0, 8.0, 9.0, 8.0],  # no area, inside
        [3.0, 4.0, 3.0, 20.0],  # no width
        [-500.0, -500.0, 900.0, 900.0],  # huge: most of it outside
        [width + 90, 0.0, width + 99, 9.0],  # outside, to the right
        [-99.0, -99.0, -90.0, -90.0],  # outside, above and to the left
        [-8.0, -8.0, 4.0, 4.0],  # over the corner
        [-4.0, -4.0, -4.0, -4.0],  # sample points exactly one cell outside, at stride 4
        [width, height, width, height],  # sample points on the far border
        [width + 2, height + 2, width + 2, height + 2],  # the same at stride 4 with `aligned`
    ]
    return torch.cat((torch.cat((centres - sides / 2, centres + sides / 2), dim=1), torch.tensor(awkward)))


def random_case(channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Two maps of 9 x 13 cells at stride 4, boxes, and the image of each box."""
    boxes = random_boxes(30, height=36.0, width=52.0)
    return torch.randn(2, channels, 9, 13), boxes, torch.randint(0, 2, (len(boxes),))


def ramp(height: int, width: int, of: str = "column") -> Tensor:
    """A (1, 1, H, W) map whose cells hold their own column, or row, number."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (columns if of == "column" else rows).float()[None, None]


# The slow loops: one cell, one point at a time, in float64 and differentiable in the map.


def loop_roi_pool(features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int) -> Tensor:
    out = features.new_zeros(len(boxes), features.shape[1], size, size)
    height, width = features.shape[2:]
    for r, box in enumerate(boxes.tolist()):
        # Halves are rounded away from zero, as C does; Python rounds them to even.
        left, top, right, bottom = (int(math.copysign(math.floor(abs(side / stride) + 0.5), side)) for side in box)
        bin_width, bin_height = max(right - left + 1, 1) / size, max(bottom - top + 1, 1) / size
        for i, j in itertools.product(range(size), repeat=2):
            rows = slice(*bin_range(i, bin_height, top, height))
            columns = slice(*bin_range(j, bin_width, left, width))
            cells = features[images[r], :, rows, columns]
            if cells.numel():
                out[r, :, i, j] = cells.amax(dim=(1, 2))
    return out


def bin_range(index: int, side: float, start: int, length: int) -> tuple[int, int]:
    # Rounding at 1e-9 keeps 3 * (7 / 3) at 7.
    first, last = math.floor(round(index * side, 9)), math.ceil(round((index + 1) * side, 9))
    return min(max(start + first, 0), length), min(max(start + last, 0), length)


def loop_roi_align(
    features: Tensor,
    boxes: Tensor,
    images: Tensor,
    stride: float,
    size: int,
    aggregate: str,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    out = features.new_zeros(len(boxes), features.shape[1], size, size)
    for r, box in enumerate(boxes.tolist()):
        left, top, right, bottom = (side / stride - (0.5 if aligned else 0.0) for side in box)
        smallest = 0.0 if aligned else 1.0
        bin_width, bin_height = max(right - left, smallest) / size, max(bottom - top, smallest) / size
        per_row = sampling_ratio or math.ceil(bin_width)
        per_column = sampling_ratio or math.ceil(bin_height)
        for i, j in itertools.product(range(size), repeat=2):
            points = [
                read_point(
                    features[images[r]],
                    top + i * bin_height + (m + 0.5) * bin_height / per_column,
                    left + j * bin_width + (n + 0.5) * bin_width / per_row,
                )
                for m, n in itertools.product(range(per_column), range(per_row))
            ]
            if points:
                stacked = torch.stack(points)
                out[r, :, i, j] = stacked.mean(dim=0) if aggregate == "average" else stacked.amax(dim=0)
    return out


def read_point(feature: Tensor, y: float, x: float) -> Tensor:
    """Read a (C, H, W) map at row y and column x, cells at whole numbers."""
    height, width = feature.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return feature.new_zeros(feature.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = feature[:, top, left] * (1 - across) + feature[:, top, right] * across
    lower = feature[:, bottom, left] * (1 - across) + feature[:, bottom, right] * across
    return upper * (1 - down) + lower * down


def with_gradient(layer, features: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Return what the layer gives for a map and, for one fixed random weighting of it, the map's gradient."""
    features = features.clone().requires_grad_()
    pooled = layer(features, *args, **kwargs)
    weighting = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weighting).sum().backward()
    assert features.grad is not None
    return pooled.detach(), features.grad


def assert_equal_with_gradient(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5
) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


# The worked example of an 8 x 8 map: the region of rows 3..8 and columns 0..7 (5 x 7 cells), pooled to 2 x 2.

REGION = torch.tensor([[0.0, 3.0, 7.0, 8.0]])


def test_8x8_roi_align_reads_the_centres_of_the_quarters_of_bins_of_2_5_by_3_5():
    rows, columns = (
        roi_align(ramp(8, 8, of), REGION, FIRST, stride=1, size=4, sampling_ratio=1)[0, 0] for of in ("row", "column")
    )  # a grid of 4 x 4 with one point a bin: the 16 points of 2 x 2 bins
    # Quarters of 1.25 x 1.75, centres at y = 3.625, 4.875, 6.125, 7.375 and x = 0.875, 2.625, 4.375, 6.125; the
    # value of a cell stands at its centre, so the ramp reads half a cell less.
    assert rows[:, 0].tolist() == [3.125, 4.375, 5.625, 6.875]
    assert columns[0].tolist() == [0.375, 2.125, 3.875, 5.625]


def test_8x8_roi_align_average_is_the_centre_of_the_bin_and_maximum_its_last_quarter_on_a_ramp():
    features = 10 * ramp(8, 8, "row") + ramp(8, 8)
    average = roi_align(features, REGION, FIRST, stride=1, size=2)
    maximum = roi_align(features, REGION, FIRST, stride=1, size=2, aggregate="maximum")
    # Bin centres y = 4.25, 6.75 and x = 1.75, 5.25, less 0.5.
    assert average[0, 0].tolist() == [[38.75, 42.25], [63.75, 67.25]]
    assert maximum[0, 0].tolist() == [[45.875, 49.375], [70.875, 74.375]]


def test_8x8_roi_align_of_a_single_bright_cell():
    features = torch.zeros(1, 1, 8, 8)
    features[0, 0, 4, 2] = 1.0
    points = roi_align(features, REGION, FIRST, stride=1, size=4, sampling_ratio=1)
    # The points (3.125, 2.125) and (4.375, 2.125) are next to it: 0.125 * 0.875 and 0.625 * 0.875 of it.
    assert points[0, 0, :2, :2].tolist() == [[0.0, 0.109375], [0.0, 0.546875]]
    maximum = roi_align(features, REGION, FIRST, stride=1, size=2, aggregate="maximum")
    average = roi_align(features, REGION, FIRST, stride=1, size=2)
    assert maximum[0, 0].tolist() == [[0.546875, 0.0], [0.0, 0.0]]
    assert average[0, 0].tolist() == [[0.1640625, 0.0], [0.0, 0.0]]  # (0.109375 + 0.546875) / 4


def test_8x8_roi_pool_counts_the_last_cell():
    features = 10 * ramp(8, 8, "row") + ramp(8, 8)
    # Columns 0..7 and rows 3..8, the corner cells included: 8 x 6 cells, bins of 4 x 3; row 8 is outside the map.
    assert roi_pool(features, REGION, FIRST, stride=1, size=2)[0, 0].tolist() == [[53.0, 57.0], [73.0, 77.0]]
    assert cells_read(features, REGION, size=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_8x8_roi_pool_of_exactly_5_by_7_cells_shares_the_middle_row_and_column():
    features = 10 * ramp(8, 8, "row") + ramp(8, 8)
    region = torch.tensor([[0.0, 3.0, 6.0, 7.0]])  # last cells 6 and 7: 7 columns, 5 rows, bins of 3.5 x 2.5
    # Columns 0..3 and 3..6, rows 3..5 and 5..7.
    assert roi_pool(features, region, FIRST, stride=1, size=2)[0, 0].tolist() == [[53.0, 56.0], [73.0, 76.0]]
    assert cells_read(features, region, size=2) == [[0, 1, 2, 3], [3, 4, 5, 6]]


def cells_read(features: Tensor, box: Tensor, size: int, stride: float = 1) -> list[list[int]]:
    """Return the columns that each column of RoIPool's bins reads: those where a bright cell shows in it."""
    found: list[list[int]] = [[] for _ in range(size)]
    row = int(box[0, 1] / stride)
    for column in range(features.shape[3]):
        single = torch.zeros_like(features)
        single[0, 0, row, column] = 1.0
        pooled = roi_pool(single, box, FIRST, stride=stride, size=size)[0, 0, 0]
        for index in pooled.nonzero().flatten().tolist():
            found[index].append(column)
    return found


# The worked example of an 800 px image and a 665 px object, at stride 32: 25 cells and 20.78 cells.

OBJECT = torch.tensor([[0.0, 0.0, 665.0, 665.0]])


def test_665_px_in_the_popular_account_reads_14_of_20_78_cells():
    assert 800 / 32 == 25
    assert 665 / 32 == 20.78125
    kept = int(665 / 32)
    assert kept == 20
    assert kept / 7 == pytest.approx(2.857, abs=1e-3)
    assert int(kept / 7) * 7 == 14


def test_665_px_roi_pool_rounds_to_cell_21_and_shares_cells_between_bins():
    features = ramp(25, 25)
    assert round(665 / 32) == 21  # the last cell; with cell 0 these are 22, in bins of 22 / 7 = 3.142857
    assert 22 * 32 == 704 == 665 + 39
    pooled = roi_pool(features, OBJECT, FIRST, stride=32, size=7)
    assert pooled[0, 0, 0].tolist() == [3, 6, 9, 12, 15, 18, 21]  # on a ramp, the last cell of each bin
    assert cells_read(features, OBJECT, size=7, stride=32) == [
        list(range(first, first + 4)) for first in (0, 3, 6, 9, 12, 15, 18)
    ]


def test_665_px_roi_pool_cannot_tell_boxes_that_round_alike_and_roi_align_can():
    features = ramp(25, 25)
    moved = OBJECT + torch.tensor([[10.0, 0.0, 10.0, 0.0]])  # 0.3125 cells to the right
    pools = [roi_pool(features, box, FIRST, stride=32, size=7) for box in (OBJECT, moved)]
    assert torch.equal(*pools)
    aligns = [roi_align(features, box, FIRST, stride=32, size=7) for box in (OBJECT, moved)]
    # Away from the map's border, where the first sample point is clamped, everything moves along.
    torch.testing.assert_close((aligns[1] - aligns[0])[..., 1:], torch.full((1, 1, 7, 6), 0.3125))


def test_665_px_roi_align_keeps_20_78_cells_in_bins_of_2_96875():
    features = ramp(25, 25)
    assert 665 / 7 == 95  # pixels
    assert 95 / 32 == 2.96875  # cells
    pooled = roi_align(features, OBJECT, FIRST, stride=32, size=7)
    centres = [(index + 0.5) * 2.96875 for index in range(7)]
    assert centres[:2] == [1.484375, 4.453125]
    expected = [centre - 0.5 for centre in centres]
    assert expected[:2] == [0.984375, 3.953125]
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor(expected))
    points = roi_align(features, OBJECT, FIRST, stride=32, size=14, sampling_ratio=1)[0, 0, 0]
    assert points[:2].tolist() == [0.2421875, 1.7265625]  # 0.7421875 and 2.2265625 cells from the edge, less 0.5


def test_aligned_moves_by_half_a_cell_and_legacy_widens_small_boxes():
    features = ramp(8, 8)
    box = torch.tensor([[4.0, 8.0, 4.8, 16.0]])  # 0.2 cells wide at stride 4
    aligned = roi_align(features, box, FIRST, stride=4, size=1)
    legacy = roi_align(features, box, FIRST, stride=4, size=1, aligned=False)
    assert aligned.item() == pytest.approx(0.6)  # the centre 1.1, less 0.5
    assert legacy.item() == pytest.approx(1.5)  # the centre of 1..2


# The slow loops


def test_roi_pool_equals_the_loop():
    features, boxes, images = random_case()
    found = with_gradient(roi_pool, features, boxes, images, stride=4, size=3)
    expected = with_gradient(loop_roi_pool, features.double(), boxes, images, 4.0, 3)
    assert_equal_with_gradient(found, expected)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("choice", [("average", 0), ("average", 1), ("average", 3), ("maximum", 2)], ids=str)
def test_roi_align_equals_the_loop(choice: tuple[str, int], aligned: bool):
    features, boxes, images = random_case(channels=3)
    # Adaptive sampling takes a point a cell: for the huge box the loop would take minutes.
    fit = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) < 200 if choice[1] == 0 else slice(None)
    boxes, images = boxes[fit], images[fit]
    how = {"aggregate": choice[0], "sampling_ratio": choice[1], "aligned": aligned}
    # Both in float64: that it is kept is part of the test, and at the border a point's side hangs on the last bit.
    found = with_gradient(roi_align, features.double(), boxes, images, stride=4, size=3, **how)
    expected = with_gradient(loop_roi_align, features.double(), boxes, images, stride=4, size=3, **how)
    # Where points of a bin tie (outside the map) the maximum's gradient is shared otherwise, but falls on no cell.
    assert_equal_with_gradient(found, expected, tolerance=1e-10)


# torchvision's kernels


def numbered(boxes: Tensor, images: Tensor) -> Tensor:
    return torch.cat((images[:, None].to(boxes.dtype), boxes), dim=1)


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("size", [1, 7])
def test_roi_pool_equals_torchvision(size: int, memory: torch.memory_format):
    features, boxes, images = random_case()
    found = with_gradient(roi_pool, features.contiguous(memory_format=memory), boxes, images, stride=4, size=size)
    expected = with_gradient(torchvision.ops.roi_pool, features, numbered(boxes, images), size, 0.25)
    assert_equal_with_gradient(found, expected)


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 7])
def test_roi_align_average_equals_torchvision(
    size: int, sampling_ratio: int, aligned: bool, memory: torch.memory_format
):
    features, boxes, images = random_case()
    found = with_gradient(
        roi_align,
        features.contiguous(memory_format=memory),
        boxes,
        images,
        stride=4,
        size=size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    kernel = torchvision.ops.roi_align
    rois = numbered(boxes, images)
    assert_equal_with_gradient(found, with_gradient(kernel, features, rois, size, 0.25, sampling_ratio, aligned))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_roi_align_maximum_equals_max_pooling_of_torchvision_at_a_finer_grid(samples: int, aligned: bool):
    features, boxes, images = random_case()
    features = features.relu()  # ties at 0, as after a ReLU: their gradient must fall on the same cell

    def expected(features: Tensor) -> Tensor:
        rois = numbered(boxes, images)
        return F.max_pool2d(torchvision.ops.roi_align(features, rois, 7 * samples, 0.25, 1, aligned), samples)

    how = {"aggregate": "maximum", "sampling_ratio": samples, "aligned": aligned}
    found = with_gradient(roi_align, features, boxes, images, stride=4, size=7, **how)
    assert_equal_with_gradient(found, with_gradient(expected, features))


@pytest.mark.parametrize("stride", [1, 8, 3.7])
def test_roi_align_equals_torchvision_at_any_stride(stride: float):
    features, boxes, images = random_case()
    found = roi_align(features, boxes, images, stride=stride, size=5)
    expected = torchvision.ops.roi_align(features, numbered(boxes, images), 5, 1 / stride, 2, True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@every_choice()
def test_cpu_and_gpu_agree(config):
    features, boxes, images = random_case()
    boxes, images = boxes[:-3], images[:-3]  # not the points on the border, whose side hangs on the last bit
    on_cpu = with_gradient(config.build(), features, boxes, images, stride=4, size=7)

    def on_gpu(features: Tensor) -> Tensor:
        return config.build()(features.cuda(), boxes.cuda(), images.cuda(), stride=4, size=7).cpu()

    assert_equal_with_gradient(with_gradient(on_gpu, features), on_cpu)


# What holds for every RoI layer


@every_choice()
def test_no_boxes_give_an_empty_result_in_the_graph(config):
    features = torch.randn(2, 3, 6, 8, requires_grad=True)
    boxes, images = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    pooled = config.build()(features, boxes, images, stride=4, size=7)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@every_choice()
def test_memory_format_changes_nothing(config):
    features, boxes, images = random_case()
    contiguous = with_gradient(config.build(), features, boxes, images, stride=4, size=4)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    assert_equal_with_gradient(
        with_gradient(config.build(), channels_last, boxes, images, stride=4, size=4), contiguous
    )


@every_choice()
def test_each_box_reads_its_own_image_and_order_does_not_matter(config):
    features, boxes, images = random_case()
    pooled = config.build()(features, boxes, images, stride=4, size=4)
    for index in (0, 1):
        alone = config.build()(
            features[index : index + 1],
            boxes[images == index],
            images[images == index] * 0,
            stride=4,
            size=4,
        )
        assert torch.equal(alone, pooled[images == index])
    order = torch.randperm(len(boxes))
    assert torch.equal(config.build()(features, boxes[order], images[order], stride=4, size=4), pooled[order])


@every_choice()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_maps_are_read_in_float32_also_under_autocast(config, dtype: torch.dtype):
    features, boxes, images = random_case()
    features = features.to(dtype)
    exact = with_gradient(config.build(), features.float(), boxes, images, stride=4, size=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, gradient = with_gradient(config.build(), features, boxes, images, stride=4, size=7)
        from_float32 = config.build()(features.float(), boxes, images, stride=4, size=7)
    assert torch.equal(found, exact[0].to(dtype))
    # The weighting of `with_gradient` passes through the low precision on its way back.
    torch.testing.assert_close(gradient.float(), exact[1], rtol=0.02, atol=0.1)
    assert torch.equal(from_float32, exact[0])


@every_choice()
def test_gradcheck(config):
    features = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[1.0, 2.0, 14.0, 11.0], [5.0, 6.0, 6.0, 7.0], [-3.0, -3.0, 5.0, 20.0]])
    images = torch.tensor([0, 1, 1])
    layer = config.build()
    assert torch.autograd.gradcheck(lambda features: layer(features, boxes, images, stride=4, size=2), features)


@every_choice()
def test_boxes_have_no_gradient(config):
    features, boxes, images = random_case()
    pooled = config.build()(features.requires_grad_(), boxes.requires_grad_(), images, stride=4, size=4)
    pooled.sum().backward()
    assert boxes.grad is None or not boxes.grad.any()


@every_choice()
def test_a_constant_map_pools_to_the_constant_inside(config):
    boxes = torch.tensor([[4.0, 4.0, 20.0, 12.0], [3.3, 5.1, 30.9, 27.7]])
    images = torch.zeros(2, dtype=torch.int64)
    pooled = config.build()(torch.full((1, 2, 8, 8), 0.7), boxes, images, stride=4, size=3)
    torch.testing.assert_close(pooled, torch.full((2, 2, 3, 3), 0.7))


# Config


def test_config_chooses_by_kind():
    reader = TypeAdapter(RoIConfig)
    assert reader.validate_python({"kind": "roi_pool"}) == RoIPoolConfig()
    align = reader.validate_python({"kind": "roi_align", "aggregate": "maximum", "aligned": False})
    assert align == RoIAlignConfig(aggregate="maximum", aligned=False)


def test_config_passes_its_values_to_the_layer():
    features, boxes, images = random_case()
    config = RoIAlignConfig(aggregate="maximum", sampling_ratio=3, aligned=False)
    expected = roi_align(
        features, boxes, images, stride=4, size=2, aggregate="maximum", sampling_ratio=3, aligned=False
    )
    assert torch.equal(config.build()(features, boxes, images, stride=4, size=2), expected)


def test_config_refuses_an_adaptive_maximum():
    with pytest.raises(ValidationError, match="sampling_ratio of at least 1"):
        RoIAlignConfig(aggregate="maximum", sampling_ratio=0)
    with pytest.raises(ValidationError):
        RoIAlignConfig(sampling_ratio=-1)


# The pooler

STRIDES = (4, 8, 16, 32)


def pyramid(channels: int = 3) -> list[Tensor]:
    return [torch.randn(2, channels, 512 // stride, 640 // stride) for stride in STRIDES]


def squares(*sides: float) -> Tensor:
    return torch.tensor([[10.0, 20.0, 10.0 + side, 20.0 + side] for side in sides])


def test_pooler_of_one_level_is_the_layer():
    features, boxes, images = random_case()
    pooler = RoIPooler(roi_align, strides=(4,), size=5)
    assert torch.equal(pooler([features], boxes, images), roi_align(features, boxes, images, stride=4, size=5))


def test_pooler_levels_by_hand():
    pooler = RoIPooler(roi_align, strides=STRIDES, size=7)
    #                0, 1, 112 and 224 open a level, 448 the last; beyond both ends the end serves
    boxes = squares(0.0, 1.0, 111.0, 112.0, 223.0, 224.0, 447.0, 448.0, 5000.0)
    assert pooler.assign_levels(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    oblong = torch.tensor([[0.0, 0.0, 448.0, 112.0]])  # the area counts: 448 * 112 = 224 * 224
    assert pooler.assign_levels(oblong).tolist() == [2]


def test_pooler_levels_follow_strides_and_canonical_box():
    boxes = squares(50.0, 100.0, 200.0)
    assert RoIPooler(roi_align, (8, 16), 7).assign_levels(boxes).tolist() == [0, 0, 0]
    assert RoIPooler(roi_align, (8, 16), 7, canonical_box=100.0).assign_levels(boxes).tolist() == [0, 1, 1]
    pooler = RoIPooler(roi_align, (8, 16, 32), 7, canonical_box=100.0, canonical_stride=8.0)
    assert pooler.assign_levels(boxes).tolist() == [0, 0, 1]


def test_pooler_levels_equal_torchvisions_next_to_the_boundaries_too():
    from torchvision.ops.poolers import LevelMapper

    near = [
        power * (1 + sign * distance)
        for power in (112, 224, 448)
        for sign in (-1, 1)
        for distance in (0, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5)
    ]
    boxes = torch.cat((random_boxes(2000, height=512.0, width=640.0)[:2000], squares(*near)))
    expected = LevelMapper(2, 5)([boxes])
    assert torch.equal(RoIPooler(roi_align, STRIDES, 7).assign_levels(boxes), expected)
    assert expected.unique().tolist() == [0, 1, 2, 3]


@every_choice()
def test_pooler_reads_each_box_from_its_level_in_order(config):
    features = pyramid()
    boxes = random_boxes(20, height=512.0, width=640.0)
    images = torch.randint(0, 2, (len(boxes),))
    pooler = RoIPooler(config.build(), STRIDES, size=4)
    pooled = pooler(features, boxes, images)
    levels = pooler.assign_levels(boxes).tolist()
    assert set(levels) == {0, 1, 2, 3}
    for r, level in enumerate(levels):
        alone = config.build()(features[level], boxes[r : r + 1], images[r : r + 1], stride=STRIDES[level], size=4)
        assert torch.equal(pooled[r], alone[0])


def test_pooler_equals_torchvisions_forward_and_backward():
    features = pyramid()
    boxes = random_boxes(40, height=512.0, width=640.0).clamp(min=0)
    boxes[:, 0::2].clamp_(max=640.0)
    boxes[:, 1::2].clamp_(max=512.0)
    halves = [boxes[:25], boxes[25:]]
    images = torch.tensor([0] * 25 + [1] * (len(boxes) - 25))
    peer = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)

    def ours(*maps: Tensor) -> Tensor:
        layer = RoIAlignConfig(aligned=False).build()
        return RoIPooler(layer, STRIDES, size=7)(maps, boxes, images)

    def theirs(*maps: Tensor) -> Tensor:
        return peer({str(index): level for index, level in enumerate(maps)}, halves, [(512, 640)] * 2)

    results = []
    for pooler in (ours, theirs):
        maps = [level.clone().requires_grad_() for level in features]
        pooled = pooler(*maps)
        weighting = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
        results.append([pooled.detach(), *torch.autograd.grad((pooled * weighting).sum(), maps)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_choice()
@pytest.mark.parametrize("count", [0, 1])
def test_pooler_keeps_levels_without_boxes_in_the_graph(config, count: int):
    features = [level.requires_grad_() for level in pyramid()]
    pooler = RoIPooler(config.build(), STRIDES, size=7)
    pooled = pooler(features, squares(50.0)[:count], FIRST[:count])
    assert pooled.shape == (count, 3, 7, 7)
    pooled.sum().backward()
    assert [level.grad is not None for level in features] == [True] * 4
    assert [bool(level.grad.any()) for level in features] == [count == 1, False, False, False]


@every_choice()
def test_pooler_result_is_channels_last(config):
    pooled = RoIPooler(config.build(), STRIDES, size=7)(pyramid(), squares(50.0, 300.0), torch.tensor([0, 1]))
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_pooler_refuses_strides_that_do_not_double():
    with pytest.raises(AssertionError):
        RoIPooler(roi_align, strides=(4, 16), size=7)
