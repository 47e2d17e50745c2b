"""Mask head: a binary mask for every class, of which only one is ever used.

The classes do not compete for a pixel: each mask is a sigmoid of its own and the loss is binary, on the mask of the
region's class alone. The box head decides the class (Mask R-CNN, arXiv 1703.06870, section 3).

Shapes: N regions, C channels, S cells along a region's side, M mask side, K classes, B images.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from maskrcnn.config import Section
from maskrcnn.models.initialization import init_he, init_normal
from maskrcnn.models.losses import Normalizer, sample_mean

MaskTarget = Literal["coverage", "torchvision"]


class MaskHeadConfig(Section):
    """A fully convolutional head: `depth` 3x3 convolutions, a deconvolution that doubles the side, and K masks.

    `target` is what a cell should say: `coverage`, whether the object's mask covers at least half of it, exactly; or
    `torchvision`, that library's soft samples. `paste` is how a mask gets onto the image: `exact`, or `torchvision`,
    which rounds the box to whole pixels.
    """

    pool_size: PositiveInt = 14
    depth: NonNegativeInt = 4
    width: PositiveInt = 256
    target: MaskTarget = "coverage"
    paste: Literal["exact", "torchvision"] = "exact"

    def build(self, *, channels: int, num_classes: int, normalizer: Normalizer) -> MaskHead:
        """The head for regions with `channels` channels."""
        return MaskHead(
            channels=channels, depth=self.depth, width=self.width, num_classes=num_classes, normalizer=normalizer
        )


class MaskHead(nn.Module):
    """Convolutions that keep the layout of the region, so that each cell of the mask looks at its own place."""

    def __init__(self, *, channels: int, depth: int, width: int, num_classes: int, normalizer: Normalizer) -> None:
        super().__init__()
        self.normalizer: Normalizer = normalizer
        convs = [nn.Conv2d(channels if index == 0 else width, width, 3, padding=1) for index in range(depth)]
        self.convs = nn.ModuleList(convs)
        self.upsample = nn.ConvTranspose2d(width if depth else channels, width, 2, 2)
        self.logits = nn.Conv2d(width, num_classes, 1)
        for layer in (*convs, self.upsample):
            init_he(layer)
        init_normal(self.logits, std=0.001)

    def features(self, regions: Tensor) -> Tensor:
        """Regions `(N, C, S, S)` to what the masks are read from, `(N, width, M, M)` with M = 2 S."""
        for conv in self.convs:
            regions = F.relu_(conv(regions))
        return F.relu_(self.upsample(regions))

    def all_masks(self, regions: Tensor) -> Tensor:
        """The logits of all K masks: `(N, C, S, S) -> (N, K, M, M)`."""
        return self.logits(self.features(regions))

    def forward(self, regions: Tensor, labels: Tensor) -> Tensor:
        """The logits of the mask of each region's own class, `(N, M, M)`.

        The same numbers as `all_masks(regions)[arange(N), labels - 1]`, without computing the K - 1 others.

        Args:
            regions: `(N, C, S, S)`.
            labels: `(N,)` int64, 1..K.
        """
        features = self.features(regions).permute(0, 2, 3, 1)  # (N, M, M, width): the layout that it has in memory
        # A 1x1 convolution is a dot product over channels: (N, M * M, width) x (N, width, 1).
        kernels = self.logits.weight.flatten(1)[labels - 1][..., None]
        assert self.logits.bias is not None
        own = torch.bmm(features.flatten(1, 2), kernels) + self.logits.bias[labels - 1][:, None, None]
        return own.view(features.shape[:3])

    def loss(self, logits: Tensor, wanted: Tensor, *, images: Tensor, batch: int) -> Tensor:
        """Binary cross entropy, mean over the cells of a mask and over the positives; 0 without any.

        Args:
            logits: `(N, M, M)` of each region's own class.
            wanted: `(N, M, M)` in 0..1.
            images: `(N,)` image of each region.
            batch: number of images, B.
        """
        values = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean(dim=(1, 2))
        counts = values.new_zeros(batch).index_add(0, images, torch.ones_like(values))
        return sample_mean(values, images, counts, per=self.normalizer)
