"""The model as a graph of operators, from uint8 pixels to detections, without Python code: what `export` writes.

Shapes: B images, H x W pixels, D detections, M mask side.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.nms import nms_as_operator
from maskrcnn.structures import ImageBatch

OUTPUTS = ("boxes", "labels", "scores", "masks")  # without a mask head the first three
EXAMPLE = (2, 3, 70, 100)  # the shape of the images that are traced; the graph takes any


class DetectionGraph(nn.Module):
    """Pads images to the stride of the model, normalises them, and detects objects."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return `OUTPUTS` for images `(B, 3, H, W)` uint8 RGB of one size.

        Boxes `(B, D, 4)` are `(x1, y1, x2, y2)` in pixels of these images, labels `(B, D)` int64 from 1, scores
        `(B, D)` descending, masks `(B, D, M, M)` probabilities in the cells of the box. D is
        `model.detection.detections_per_image`; label and score of a slot without a detection are 0.
        """
        divisor, device = self.model.size_divisor, images.device
        height, width = images.shape[2:]
        batch = _any_size(images.shape[0])
        rows, columns = (_any_size((length + divisor - 1) // divisor) * divisor for length in (height, width))
        # The model sets what is outside of an image to zero, so it may have any value here: that of the border.
        pixels = images.index_select(0, torch.arange(batch, device=device))
        pixels = pixels.index_select(2, torch.arange(rows, device=device).clamp(max=height - 1))
        pixels = pixels.index_select(3, torch.arange(columns, device=device).clamp(max=width - 1))
        sizes = torch.stack([torch.full((batch,), length, device=device) for length in (height, width)], dim=1)
        seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        detections = self.model.detect(ImageBatch(pixels, sizes, seeds))
        scores = torch.where(detections.valid, detections.scores, 0)
        outputs = (detections.boxes, detections.labels.clamp(min=0), scores)
        return outputs if self.model.mask_head is None else (*outputs, detections.masks)


def _any_size(length: int) -> int:
    """Return the length as a number of which the tracer knows only that it is at least 1.

    What the tracer derives from the shape of an image would hold for that shape: it assumes lengths of at least 2, and
    memory layouts that depend on them.
    """
    if not torch.compiler.is_exporting():
        return length
    unknown = cast(int, torch.full((), length).item())
    torch._check(unknown >= 1)
    return unknown


def trace(model: MaskRCNN, *, nms_operator: bool) -> torch.export.ExportedProgram:
    """Return the graph of `DetectionGraph` for images of any size and number, on the CPU.

    Args:
        model: the model, which is not changed.
        nms_operator: whether NMS is one node, `maskrcnn::nms`, for an exporter to translate; otherwise it consists of
            torch's operators.
    """
    # Parameters in contiguous memory: torch.export stores others with a copy of their storage.
    graph = DetectionGraph(copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval())
    any_size = torch.export.Dim.DYNAMIC(min=1)
    with torch.no_grad(), nms_as_operator() if nms_operator else nullcontext():
        return torch.export.export(
            graph,
            (torch.zeros(EXAMPLE, dtype=torch.uint8),),
            dynamic_shapes={"images": {0: any_size, 2: any_size, 3: any_size}},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
