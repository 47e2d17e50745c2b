"""RoI layers compared with values computed by hand and torchvision's kernels; `test_roi_contract.py` has slow loops.

Shapes: B images, C channels, H and W of a feature map, R boxes, S size of the output grid, N sample points per
bin and axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from pydantic import ValidationError
from torch import Tensor

from maskrcnn.ops.roi import (
    RoIAlignConfig,
    RoILayerConfig,
    RoIPoolConfig,
    RoIPooler,
    RoIWarpConfig,
    Rounding,
    roi_align,
    roi_pool,
    roi_warp,
)

CHOICES = [
    RoIPoolConfig(),
    RoIPoolConfig(rounding="floor"),
    RoIWarpConfig(),
    RoIAlignConfig(),
    RoIAlignConfig(aggregate="maximum"),
]
Case = tuple[Tensor, Tensor, Tensor]  # feature map, boxes, image index of each box
FIRST = torch.zeros(1, dtype=torch.int64)
MEMORY = [torch.contiguous_format, torch.channels_last]


def every_choice() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", CHOICES, ids=str)


def ramp(height: int, width: int, of: str = "column") -> Tensor:
    """Return a (1, 1, H, W) map in which the value of a cell is its column, or row, index."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (columns if of == "column" else rows).float()[None, None]


def with_gradient(layer, features: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Return the output of the layer and the gradient of the map for a fixed random weighting of the output."""
    features = features.clone().requires_grad_()
    pooled = layer(features, *args, **kwargs)
    weighting = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weighting).sum().backward()
    assert features.grad is not None
    return pooled.detach(), features.grad


def assert_equal_with_gradient(
    results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5
) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


# The worked example of an 8 x 8 map: the region of rows 3..8 and columns 0..7 (5 x 7 cells), pooled to 2 x 2.

REGION = torch.tensor([[0.0, 3.0, 7.0, 8.0]])


def test_8x8_roi_align_reads_the_centres_of_the_quarters_of_bins_of_2_5_by_3_5():
    rows, columns = (
        roi_align(ramp(8, 8, of), REGION, FIRST, stride=1, size=4, sampling_ratio=1)[0, 0] for of in ("row", "column")
    )  # a 4 x 4 grid with one point per bin has the 16 points of 2 x 2 bins
    # Quarters of 1.25 x 1.75, centres at y = 3.625, 4.875, 6.125, 7.375 and x = 0.875, 2.625, 4.375, 6.125. The
    # value of a cell is located at its centre, so the ramp has 0.5 less there.
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
    # Its neighbours are the points (3.125, 2.125) and (4.375, 2.125), with weights 0.125 * 0.875 and 0.625 * 0.875.
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


def test_8x8_roi_pool_floor_has_exactly_5_by_7_cells_in_disjoint_bins():
    features = 10 * ramp(8, 8, "row") + ramp(8, 8)
    # Half of 7 columns, 3.5, becomes 3; half of 5 rows, 2.5, becomes 2. Columns 0..2 and 3..6, rows 3..4 and 5..7.
    pooled = roi_pool(features, REGION, FIRST, stride=1, size=2, rounding="floor")
    assert pooled[0, 0].tolist() == [[42.0, 46.0], [72.0, 76.0]]
    assert cells_read(features, REGION, size=2, rounding="floor") == [[0, 1, 2], [3, 4, 5, 6]]


def test_8x8_roi_warp_reads_the_box_of_roi_pool_at_points():
    rows, columns = (
        roi_warp(ramp(8, 8, of), REGION, FIRST, stride=1, size=4, sampling_ratio=1)[0, 0] for of in ("row", "column")
    )
    # Columns 0..8 and rows 3..9, bins of 4 x 3, quarters of 2 x 1.5 with centres at x = 1, 3, 5, 7 and y = 3.75, 5.25,
    # 6.75, 8.25, less 0.5. The last one, row index 7.75, lies outside the map and reads the border, row 7.
    assert columns[0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert rows[:, 0].tolist() == [3.25, 4.75, 6.25, 7.0]
    features = 10 * ramp(8, 8, "row") + ramp(8, 8)
    average = roi_warp(features, REGION, FIRST, stride=1, size=2)
    maximum = roi_warp(features, REGION, FIRST, stride=1, size=2, aggregate="maximum")
    assert average[0, 0].tolist() == [[41.5, 45.5], [67.75, 71.75]]
    assert maximum[0, 0].tolist() == [[50.0, 54.0], [72.5, 76.5]]


def test_8x8_the_box_of_one_region_of_the_command_line():
    box = torch.tensor([[1.0, 1.0, 6.0, 8.0]])  # `tools/explain_roi.py --map 8x8 --box 1,1,6,8 --output 2x2`
    features = 10 * ramp(8, 8, "row") + ramp(8, 8)
    layers = (roi_pool, functools.partial(roi_pool, rounding="floor"), roi_warp, roi_align)
    assert [layer(features, box, FIRST, stride=1, size=2)[0, 0].tolist() for layer in layers] == [
        [[43.0, 46.0], [73.0, 76.0]],
        [[32.0, 35.0], [72.0, 75.0]],
        [[27.0, 30.0], [64.5, 67.5]],
        [[24.25, 26.75], [59.25, 61.75]],
    ]


def cells_read(
    features: Tensor, box: Tensor, size: int, stride: float = 1, rounding: Rounding = "round"
) -> list[list[int]]:
    """Return the map columns that each column of RoIPool's bins reads, found by setting one cell at a time to 1."""
    columns_of_bin: list[list[int]] = [[] for _ in range(size)]
    row = int(box[0, 1] / stride)
    for column in range(features.shape[3]):
        single = torch.zeros_like(features)
        single[0, 0, row, column] = 1.0
        pooled = roi_pool(single, box, FIRST, stride=stride, size=size, rounding=rounding)[0, 0, 0]
        for index in pooled.nonzero().flatten().tolist():
            columns_of_bin[index].append(column)
    return columns_of_bin


def test_the_kernel_adds_a_cell_to_bins_because_of_float32_rounding():
    box = torch.tensor(
        [[0.0, 0.0, 56.0, 0.0]]
    )  # 57 cells in 7 bins: in float32 the last border is slightly more than 57
    assert cells_read(torch.zeros(1, 1, 1, 64), box, size=7)[-1] == list(range(48, 58))


# The worked example of an 800 px image and a 665 px object, at stride 32: 25 cells and 20.78 cells.

OBJECT = torch.tensor([[0.0, 0.0, 665.0, 665.0]])


def test_665_px_with_quantised_box_and_bins_reads_14_of_20_78_cells():
    assert 800 / 32 == 25
    assert 665 / 32 == 20.78125
    cells = int(665 / 32)
    assert cells == 20
    assert cells / 7 == pytest.approx(2.857, abs=1e-3)
    assert int(cells / 7) * 7 == 14


def test_665_px_roi_pool_rounds_to_cell_21_and_shares_cells_between_bins():
    features = ramp(25, 25)
    assert round(665 / 32) == 21  # the last cell; with cell 0 these are 22, in bins of 22 / 7 = 3.142857
    assert 22 * 32 == 704 == 665 + 39
    pooled = roi_pool(features, OBJECT, FIRST, stride=32, size=7)
    assert pooled[0, 0, 0].tolist() == [3, 6, 9, 12, 15, 18, 21]  # on a ramp, the last cell of each bin
    assert cells_read(features, OBJECT, size=7, stride=32) == [
        list(range(first, first + 4)) for first in (0, 3, 6, 9, 12, 15, 18)
    ]


def test_665_px_roi_pool_floor_reads_20_cells_once_each():
    features = ramp(25, 25)
    assert [index * 20 // 7 for index in range(8)] == [0, 2, 5, 8, 11, 14, 17, 20]
    assert 20 * 32 == 640 == 665 - 25
    pooled = roi_pool(features, OBJECT, FIRST, stride=32, size=7, rounding="floor")
    assert pooled[0, 0, 0].tolist() == [1, 4, 7, 10, 13, 16, 19]
    assert cells_read(features, OBJECT, size=7, stride=32, rounding="floor") == [
        [0, 1],
        [2, 3, 4],
        [5, 6, 7],
        [8, 9, 10],
        [11, 12, 13],
        [14, 15, 16],
        [17, 18, 19],
    ]


def test_665_px_roi_warp_stretches_22_cells_over_the_grid():
    features = ramp(25, 25)
    pooled = roi_warp(features, OBJECT, FIRST, stride=32, size=7)[0, 0, 0]
    expected = [(index + 0.5) * 22 / 7 - 0.5 for index in range(7)]
    assert expected == pytest.approx([1.0714, 4.2143, 7.3571, 10.5, 13.6429, 16.7857, 19.9286], abs=1e-4)
    torch.testing.assert_close(pooled, torch.tensor(expected))
    points = roi_warp(features, OBJECT, FIRST, stride=32, size=14, sampling_ratio=1)[0, 0, 0]
    assert points[:2].tolist() == pytest.approx([0.2857, 1.8571], abs=1e-4)  # 11 / 14 and 33 / 14, less 0.5
    exact = roi_align(features, OBJECT, FIRST, stride=32, size=7)[0, 0, 0]
    # The offset from the exact position grows from 3 image pixels in the first bin to 36 in the last.
    assert (32 * (pooled - exact)).tolist() == pytest.approx([2.79, 8.36, 13.93, 19.5, 25.07, 30.64, 36.21], abs=5e-3)


def test_665_px_only_roi_align_distinguishes_boxes_with_equal_quantisation():
    features = ramp(25, 25)
    moved = OBJECT + torch.tensor([[10.0, 0.0, 10.0, 0.0]])  # 0.3125 cells to the right
    for layer in (roi_pool, roi_warp):
        assert torch.equal(*(layer(features, box, FIRST, stride=32, size=7) for box in (OBJECT, moved)))
    floor = functools.partial(roi_pool, rounding="floor")  # 675 px would be in cell 21; 671 px are in cell 20
    assert torch.equal(*(floor(features, box, FIRST, stride=32, size=7) for box in (OBJECT, OBJECT + 6)))
    aligns = [roi_align(features, box, FIRST, stride=32, size=7) for box in (OBJECT, moved)]
    # Without the first column, whose first sample point is clamped at the border.
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


# torchvision's kernels


def with_image_index(boxes: Tensor, images: Tensor) -> Tensor:
    return torch.cat((images[:, None].to(boxes.dtype), boxes), dim=1)


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("size", [1, 7])
def test_roi_pool_equals_torchvision(random_case: Case, size: int, memory: torch.memory_format):
    features, boxes, images = random_case
    result = with_gradient(roi_pool, features.contiguous(memory_format=memory), boxes, images, stride=4, size=size)
    expected = with_gradient(torchvision.ops.roi_pool, features, with_image_index(boxes, images), size, 0.25)
    assert_equal_with_gradient(result, expected)


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 7])
def test_roi_align_average_equals_torchvision(
    random_case: Case, size: int, sampling_ratio: int, aligned: bool, memory: torch.memory_format
):
    features, boxes, images = random_case
    result = with_gradient(
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
    rois = with_image_index(boxes, images)
    assert_equal_with_gradient(result, with_gradient(kernel, features, rois, size, 0.25, sampling_ratio, aligned))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_roi_align_maximum_equals_max_pooling_of_torchvision_at_a_finer_grid(
    random_case: Case, samples: int, aligned: bool
):
    features, boxes, images = random_case
    features = features.relu()  # ties at 0, as after a ReLU: the gradient must go to the same cell

    def expected(features: Tensor) -> Tensor:
        rois = with_image_index(boxes, images)
        return F.max_pool2d(torchvision.ops.roi_align(features, rois, 7 * samples, 0.25, 1, aligned), samples)

    options = {"aggregate": "maximum", "sampling_ratio": samples, "aligned": aligned}
    result = with_gradient(roi_align, features, boxes, images, stride=4, size=7, **options)
    assert_equal_with_gradient(result, with_gradient(expected, features))


@pytest.mark.parametrize("stride", [1, 8, 3.7])
def test_roi_align_equals_torchvision_at_any_stride(random_case: Case, stride: float):
    features, boxes, images = random_case
    result = roi_align(features, boxes, images, stride=stride, size=5)
    expected = torchvision.ops.roi_align(features, with_image_index(boxes, images), 5, 1 / stride, 2, True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


# Config


def test_config_chooses_by_kind(choose):
    assert choose(RoILayerConfig, {"kind": "roi_pool"}) == RoIPoolConfig()
    align = choose(RoILayerConfig, {"kind": "roi_align", "aggregate": "maximum", "aligned": False})
    assert align == RoIAlignConfig(aggregate="maximum", aligned=False)
    warp = choose(RoILayerConfig, {"kind": "roi_warp", "sampling_ratio": 3})
    assert warp == RoIWarpConfig(sampling_ratio=3)
    assert list(warp.model_dump()) == ["kind", "aggregate", "sampling_ratio"]
    assert RoIPoolConfig().build() is roi_pool


@pytest.mark.parametrize(
    ("config", "layer", "values"),
    [
        (RoIAlignConfig, roi_align, {"aggregate": "maximum", "sampling_ratio": 3, "aligned": False}),
        (RoIWarpConfig, roi_warp, {"aggregate": "maximum", "sampling_ratio": 3}),
        (RoIPoolConfig, roi_pool, {"rounding": "floor"}),
    ],
)
def test_config_passes_its_values_to_the_layer(random_case: Case, config, layer, values):
    features, boxes, images = random_case
    result = config(**values).build()(features, boxes, images, stride=4, size=2)
    assert torch.equal(result, layer(features, boxes, images, stride=4, size=2, **values))
    assert not torch.equal(result, layer(features, boxes, images, stride=4, size=2))


@pytest.mark.parametrize("config", [RoIAlignConfig, RoIWarpConfig])
def test_config_refuses_an_adaptive_maximum(config):
    with pytest.raises(ValidationError, match="sampling_ratio of at least 1"):
        config(aggregate="maximum", sampling_ratio=0)
    with pytest.raises(ValidationError):
        config(sampling_ratio=-1)


# The pooler

STRIDES = (4, 8, 16, 32)


def pyramid(channels: int = 3) -> list[Tensor]:
    return [torch.randn(2, channels, 512 // stride, 640 // stride) for stride in STRIDES]


def squares(*sides: float) -> Tensor:
    return torch.tensor([[10.0, 20.0, 10.0 + side, 20.0 + side] for side in sides])


def test_pooler_of_one_level_is_the_layer(random_case: Case):
    features, boxes, images = random_case
    pooler = RoIPooler(roi_align, strides=(4,), size=5)
    assert torch.equal(pooler([features], boxes, images), roi_align(features, boxes, images, stride=4, size=5))


def test_pooler_levels_by_hand():
    pooler = RoIPooler(roi_align, strides=STRIDES, size=7)
    # Levels begin at 112, 224 and 448; boxes outside this range are clamped to the first or the last level.
    boxes = squares(0.0, 1.0, 111.0, 112.0, 223.0, 224.0, 447.0, 448.0, 5000.0)
    assert pooler.assign_levels(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    oblong = torch.tensor([[0.0, 0.0, 448.0, 112.0]])  # the area determines the level: 448 * 112 = 224 * 224
    assert pooler.assign_levels(oblong).tolist() == [2]


def test_pooler_levels_follow_strides_and_canonical_box():
    boxes = squares(50.0, 100.0, 200.0)
    assert RoIPooler(roi_align, (8, 16), 7).assign_levels(boxes).tolist() == [0, 0, 0]
    assert RoIPooler(roi_align, (8, 16), 7, canonical_box=100.0).assign_levels(boxes).tolist() == [0, 1, 1]
    pooler = RoIPooler(roi_align, (8, 16, 32), 7, canonical_box=100.0, canonical_stride=8.0)
    assert pooler.assign_levels(boxes).tolist() == [0, 0, 1]


def test_pooler_levels_equal_torchvisions_next_to_the_boundaries_too(random_boxes: Callable[..., Tensor]):
    from torchvision.ops.poolers import LevelMapper

    near_boundaries = [
        power * (1 + sign * distance)
        for power in (112, 224, 448)
        for sign in (-1, 1)
        for distance in (0, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5)
    ]
    boxes = torch.cat((random_boxes(2000, height=512.0, width=640.0)[:2000], squares(*near_boundaries)))
    expected = LevelMapper(2, 5)([boxes])
    assert torch.equal(RoIPooler(roi_align, STRIDES, 7).assign_levels(boxes), expected)
    assert expected.unique().tolist() == [0, 1, 2, 3]


@every_choice()
def test_pooler_reads_each_box_from_its_level_in_order(random_boxes: Callable[..., Tensor], config):
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


def test_pooler_equals_torchvisions_forward_and_backward(random_boxes: Callable[..., Tensor]):
    features = pyramid()
    boxes = random_boxes(40, height=512.0, width=640.0).clamp(min=0)
    boxes[:, 0::2].clamp_(max=640.0)
    boxes[:, 1::2].clamp_(max=512.0)
    halves = [boxes[:25], boxes[25:]]
    images = torch.tensor([0] * 25 + [1] * (len(boxes) - 25))
    their_pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)

    def ours(*maps: Tensor) -> Tensor:
        layer = RoIAlignConfig(aligned=False).build()
        return RoIPooler(layer, STRIDES, size=7)(maps, boxes, images)

    def theirs(*maps: Tensor) -> Tensor:
        return their_pooler({str(index): level for index, level in enumerate(maps)}, halves, [(512, 640)] * 2)

    results = []
    for pooler in (ours, theirs):
        maps = [level.clone().requires_grad_() for level in features]
        pooled = pooler(*maps)
        weighting = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
        results.append([pooled.detach(), *torch.autograd.grad((pooled * weighting).sum(), maps)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


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
