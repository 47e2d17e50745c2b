"""The Triton kernels on a GPU, at the sizes of a training, against torchvision's. `test_gpu.py` trains with them."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from maskrcnn.ops import cpu
from maskrcnn.ops.nms import batched_nms, nms_of_levels
from maskrcnn.ops.roi import RoIAlignConfig, RoILayerConfig, RoIPoolConfig, RoIPooler, RoIWarpConfig

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
HEIGHT, WIDTH = 800, 1344
LAYERS: list[RoILayerConfig] = [
    RoIAlignConfig(),
    RoIAlignConfig(sampling_ratio=0),
    RoIAlignConfig(aligned=False),
    RoIAlignConfig(aggregate="maximum"),
    RoIWarpConfig(),
    RoIPoolConfig(),
    RoIPoolConfig(rounding="floor"),
]


@pytest.fixture(autouse=True)
def _fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where these tests are tried on a CPU."""
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: False)


def random_boxes(*shape: int, side: float = 60.0) -> Tensor:
    """Return boxes `(*shape, 4)` inside an image. Corners are whole pixels: many overlaps are equal."""
    corners = torch.rand(*shape, 2) * torch.tensor([WIDTH, HEIGHT])
    sides = torch.exp(torch.randn(*shape, 2)) * side
    boxes = torch.cat((corners, corners + sides), dim=-1).round()
    return torch.minimum(boxes, torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])).to(GPU)


def kept_by_torchvision(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, count: int) -> Tensor:
    """Return the boxes that torchvision keeps in each group of one image, the best `count`, then by index."""
    kept_scores = torch.full_like(scores, -torch.inf)
    for group in groups.unique():
        members = ((groups == group) & (scores > -torch.inf)).nonzero()[:, 0]
        kept = members[torchvision.ops.nms(boxes[members], scores[members], threshold)]
        kept_scores[kept] = scores[kept]
    top_scores, order = kept_scores.sort(descending=True, stable=True)
    return order[top_scores > -torch.inf][:count]


@pytest.mark.parametrize("side", [20.0, 150.0])
def test_nms_of_proposals(side: float) -> None:
    sizes = [2000, 2000, 2000, 2000, 819]
    boxes = random_boxes(16, sum(sizes), side=side)
    scores = torch.rand(16, sum(sizes), device=GPU).mul(5000).round()  # with ties
    scores[:, ::50] = -torch.inf
    indices, kept_scores = nms_of_levels(boxes, scores, sizes, iou_threshold=0.7, count=1000, triton=True)
    levels = torch.arange(5).repeat_interleave(torch.tensor(sizes)).to(GPU)
    for image in range(16):
        kept = indices[image][kept_scores[image] > -torch.inf]
        assert torch.equal(kept, kept_by_torchvision(boxes[image], scores[image], levels, 0.7, 1000))


@pytest.mark.parametrize("count", [100, 20_000])
def test_nms_of_detections(count: int) -> None:
    boxes, scores = random_boxes(4, 20_000), torch.rand(4, 20_000, device=GPU).mul(5000).round()
    labels = torch.randint(1, 81, (4, 20_000), device=GPU)
    scores[1, 10:] = -torch.inf
    scores[2] = -torch.inf
    indices, kept_scores = batched_nms(boxes, scores, labels, iou_threshold=0.5, count=count, triton=True)
    for image in range(4):
        kept = indices[image][kept_scores[image] > -torch.inf]
        assert torch.equal(kept, kept_by_torchvision(boxes[image], scores[image], labels[image], 0.5, count))


def with_gradients(pooler: RoIPooler, maps: list[Tensor], boxes: Tensor, images: Tensor) -> list[Tensor]:
    pooled = pooler(maps, boxes, images)
    weighting = (torch.arange(pooled.numel(), device=GPU) % 7 - 3).view(pooled.shape).to(pooled)
    return [pooled.detach(), *torch.autograd.grad((pooled * weighting).sum(), maps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_roi_layers(config: RoILayerConfig, dtype: torch.dtype) -> None:
    strides, images = (4, 8, 16, 32), 2
    maps = [
        torch.randn(images, 256, HEIGHT // stride, WIDTH // stride, device=GPU)
        .to(dtype, memory_format=torch.channels_last)
        .requires_grad_()
        for stride in strides
    ]
    boxes = random_boxes(512, side=120.0) + 0.25  # no point on the border of a map, where rounding would decide
    boxes = torch.cat((boxes, boxes[:8] * torch.tensor([1.0, 1, 0, 0], device=GPU), boxes[:8] - 2000))
    index = torch.arange(len(boxes), device=GPU) % images
    kernel = RoIPooler(config.build(), strides, 7, pooling=config.pooling())
    results = with_gradients(kernel, maps, boxes, index)
    expected = with_gradients(RoIPooler(config.build(), strides, 7), maps, boxes, index)
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == dtype
        # Neighbouring values of a maximum may be equal but for rounding; then the gradient is at the other one.
        differs = ~torch.isclose(ours.float(), theirs.float(), rtol=tolerance, atol=10 * tolerance)
        assert differs.float().mean() < 1e-4
    assert results[0].is_contiguous(memory_format=torch.channels_last)


def test_the_index_of_a_large_batch_does_not_overflow() -> None:
    """The map has more than 2^31 values."""
    features = torch.zeros(129, 256, 256, 256, dtype=torch.bfloat16, device=GPU)
    features = features.to(memory_format=torch.channels_last)
    features[128] = 1.0
    config = RoIAlignConfig()
    pooler = RoIPooler(config.build(), (4,), 7, pooling=config.pooling())
    pooled = pooler([features], torch.tensor([[8.0, 8.0, 80.0, 80.0]], device=GPU), torch.tensor([128], device=GPU))
    assert (pooled == 1).all()


def test_steps_are_captured_as_a_graph() -> None:
    """The kernels launch on the current stream, and allocate nothing that a graph cannot replay."""
    boxes, scores = random_boxes(2, 3000), torch.rand(2, 3000, device=GPU)
    labels = torch.randint(1, 5, (2, 3000), device=GPU)
    maps = [torch.randn(2, 64, 50, 84, device=GPU).to(memory_format=torch.channels_last).requires_grad_()]
    config = RoIAlignConfig()
    pooler = RoIPooler(config.build(), (16,), 7, pooling=config.pooling())
    images = torch.arange(2, device=GPU).repeat_interleave(100)

    def work() -> tuple[Tensor, Tensor]:
        indices, _ = batched_nms(boxes, scores, labels, iou_threshold=0.5, count=100, triton=True)
        kept = boxes.gather(1, indices[..., None].expand(-1, -1, 4)).flatten(0, 1)
        pooled = pooler(maps, kept, images)
        return pooled.detach(), torch.autograd.grad(pooled.square().sum(), maps)[0]

    expected = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    graph.replay()
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
