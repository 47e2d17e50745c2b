"""Mask R-CNN (arXiv 1703.06870): the config of the model, and the model assembled from its stages.

A region is the pooled feature map `(C, S, S)` of one region of interest (RoI).

Shapes: B images, H x W pixels, N regions of all images, C channels, S cells along a region's side, M mask side. On a
CPU the N regions are without padding (`maskrcnn.ops.cpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

import maskrcnn.models.backbones.timm_features
import maskrcnn.models.backbones.vgg  # noqa: F401 (these two define kinds of backbones)
from maskrcnn.config import Section
from maskrcnn.errors import InputError
from maskrcnn.models.backbones.parts import Backbone, BackboneConfig, RegionStage
from maskrcnn.models.backbones.resnet import ResNetConfig
from maskrcnn.models.box_head import BoxHead, BoxHeadConfig, FCTrunkConfig
from maskrcnn.models.losses import Normalizer, box_head_losses, mask_loss
from maskrcnn.models.mask_head import FCNMaskHeadConfig, MaskHead, MaskHeadConfig, MaskTarget
from maskrcnn.models.necks.fpn import FPNConfig
from maskrcnn.models.necks.parts import Neck, NeckConfig, describe_maps
from maskrcnn.models.rpn import RPN, RPNConfig
from maskrcnn.models.selection import DetectionConfig, DetectionSelector, RegionSampler, SamplingConfig, diagnose
from maskrcnn.ops.boxes import BoxWeights, encode_deltas
from maskrcnn.ops.cpu import spread, used_slots
from maskrcnn.ops.kernels import Kernels, uses_triton
from maskrcnn.ops.mask_tables import mask_targets, mask_targets_torchvision
from maskrcnn.ops.roi import RoIAlignConfig, RoILayerConfig, RoIPooler
from maskrcnn.structures import ClassRows, Detections, Diagnostics, ImageBatch, Losses, RoISamples, Targets


class PixelConfig(Section):
    """Input normalisation of the backbone: channel order, and mean and standard deviation of pixels in 0..255.

    It must match the pretrained weights. The defaults match torchvision's.
    """

    order: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # in the order of the channels
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)


class LossWeightsConfig(Section):
    """Factors of the five loss terms. The recorded losses include them."""

    loss_objectness: NonNegativeFloat = 1.0
    loss_rpn_box_reg: NonNegativeFloat = 1.0
    loss_classifier: NonNegativeFloat = 1.0
    loss_box_reg: NonNegativeFloat = 1.0
    loss_mask: NonNegativeFloat = 1.0


class MaskRCNNConfig(Section):
    """The model. `roi` is the RoI layer of both heads; `box_head.roi` and `mask_head.roi` override it.

    Without a mask head (null), the model is a Faster R-CNN.
    """

    pixels: PixelConfig = PixelConfig()
    backbone: BackboneConfig = ResNetConfig()
    neck: NeckConfig = FPNConfig()
    rpn: RPNConfig = RPNConfig()
    roi: RoILayerConfig = RoIAlignConfig()
    sampling: SamplingConfig = SamplingConfig()
    box_head: BoxHeadConfig = FCTrunkConfig()
    mask_head: MaskHeadConfig | None = FCNMaskHeadConfig()
    detection: DetectionConfig = DetectionConfig()
    loss_normalizer: Normalizer = "image"
    loss_weights: LossWeightsConfig = LossWeightsConfig()
    kernels: Kernels = Field(
        "auto",
        description="of NMS and RoI layers on a GPU: operators of torch and torchvision, or this project's in Triton; "
        "auto takes those of torchvision until a GPU has run the others",
    )

    @model_validator(mode="after")
    def _sections_match(self) -> MaskRCNNConfig:
        strides, stride = self.neck.out_strides(self.backbone.strides), self.backbone.region_stride
        if len(self.rpn.anchor_sizes) != len(strides):
            raise ValueError(
                f"rpn.anchor_sizes has {len(self.rpn.anchor_sizes)} levels, but neck.kind {self.neck.kind} returns "
                f"{describe_maps(strides)}: the RPN needs one list of sizes for each; backbone.out_features and neck "
                "select the maps"
            )
        if any(head.pool_size % stride for head in (self.box_head, self.mask_head) if head is not None):
            raise ValueError(
                f"the pool_size of both heads must be a multiple of {stride}: the backbone's last stage runs on the "
                "regions and reduces them by that factor"
            )
        return self

    def build(self, num_classes: int, *, pretrained: bool = True) -> MaskRCNN:
        """Return the model for labels 1..`num_classes`; `pretrained` loads the weights of `backbone.weights`."""
        # A seed gives the same initial weights as long as the parts are built in this order.
        backbone = self.backbone.build()
        neck = self.neck.build(channels=backbone.channels, strides=backbone.strides)
        region_stage = self.backbone.build_region_stage()
        if region_stage is not None and region_stage.in_channels != neck.channels:
            raise InputError(
                f"model.neck: it returns maps of {neck.channels} channels, but a stage of model.backbone that runs on "
                f"regions needs {region_stage.in_channels}; set model.neck.kind to none"
            )
        triton = uses_triton(self.kernels)
        channels = neck.channels if region_stage is None else region_stage.channels
        shrink = 1 if region_stage is None else region_stage.stride
        trunk = self.box_head.build(channels=channels, side=self.box_head.pool_size // shrink)
        if pretrained:
            self.backbone.load_pretrained(backbone, region_stage, trunk if trunk.pretrained else None)
        box_pooler, mask_pooler = self._poolers(neck.strides[: neck.roi_levels])
        model = MaskRCNN(
            pixels=PixelNormalizer(order=self.pixels.order, mean=self.pixels.mean, std=self.pixels.std),
            backbone=backbone,
            neck=neck,
            rpn=self.rpn.build(
                channels=neck.channels, strides=neck.strides, normalizer=self.loss_normalizer, triton=triton
            ),
            sampler=self.sampling.build(),
            region_stage=region_stage,
            box_pooler=box_pooler,
            box_head=BoxHead(
                trunk=trunk,
                features=trunk.features,
                num_classes=num_classes,
                initialization=self.box_head.initialization,
            ),
            selector=self.detection.build(bbox_reg_weights=self.box_head.bbox_reg_weights, triton=triton),
            mask_pooler=mask_pooler,
            mask_head=self._build_mask_head(channels, shrink, num_classes),
            losses=self._loss_settings(),
        )
        # With channels_last, convolutions are faster on a CPU, and RoI layers read the channels of a cell contiguously.
        return model.to(memory_format=torch.channels_last)

    def _build_mask_head(self, channels: int, shrink: int, num_classes: int) -> MaskHead | None:
        if self.mask_head is None:
            return None
        return self.mask_head.build(channels=channels, side=self.mask_head.pool_size // shrink, num_classes=num_classes)

    def _loss_settings(self) -> LossSettings:
        return LossSettings(
            normalizer=self.loss_normalizer,
            bbox_reg_weights=self.box_head.bbox_reg_weights,
            smooth_l1_beta=self.box_head.smooth_l1_beta,
            mask_target=self.mask_head.target if self.mask_head else "coverage",
            weights=self.loss_weights.model_dump(),
        )

    def _poolers(self, strides: tuple[int, ...]) -> tuple[RoIPooler, RoIPooler]:
        """Return the poolers of box and mask head: the same object if their settings are equal."""
        (box_roi, box_size), (mask_roi, mask_size) = (
            (head.roi or self.roi, head.pool_size) for head in (self.box_head, self.mask_head or self.box_head)
        )
        box_pooler = self._pooler(box_roi, strides, box_size)
        if (box_roi, box_size) == (mask_roi, mask_size):
            return box_pooler, box_pooler
        return box_pooler, self._pooler(mask_roi, strides, mask_size)

    def _pooler(self, roi: RoILayerConfig, strides: tuple[int, ...], size: int) -> RoIPooler:
        pooling = roi.pooling() if uses_triton(self.kernels) else None
        return RoIPooler(roi.build(), strides=strides, size=size, pooling=pooling)


class PixelNormalizer(nn.Module):
    """Converts stored pixels to the normalised input of the backbone, on the device of the images."""

    def __init__(self, *, order: Literal["rgb", "bgr"], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.order = order
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: ImageBatch) -> Tensor:
        """Return normalised float32 pixels `(B, 3, H, W)`; the padding is 0, the mean colour."""
        pixels = images.pixels.flip(1) if self.order == "bgr" else images.pixels
        pixels = pixels.to(torch.float32, memory_format=torch.channels_last)
        height, width = pixels.shape[-2:]
        inside_y = torch.arange(height, device=pixels.device) < images.sizes[:, :1]  # (B, H)
        inside_x = torch.arange(width, device=pixels.device) < images.sizes[:, 1:]  # (B, W)
        inside = (inside_y[:, :, None] & inside_x[:, None])[:, None]
        return pixels.sub(self.mean).div_(self.std).mul_(inside)


class LossSettings(NamedTuple):
    """Settings of the targets and losses of the heads."""

    normalizer: Normalizer
    bbox_reg_weights: BoxWeights  # of the box head
    smooth_l1_beta: float  # of the box head
    mask_target: MaskTarget
    weights: Mapping[str, float]  # factors of the loss terms, by name; those of the RPN too


class MaskRCNN(nn.Module):
    """The complete model: `forward` returns losses, `detect` returns detections, both in train and in eval mode."""

    def __init__(
        self,
        *,
        pixels: nn.Module,
        backbone: Backbone,
        neck: Neck,
        rpn: RPN,
        sampler: RegionSampler,
        region_stage: RegionStage | None,
        box_pooler: RoIPooler,
        box_head: BoxHead,
        selector: DetectionSelector,
        mask_pooler: RoIPooler,
        mask_head: MaskHead | None,
        losses: LossSettings,
    ) -> None:
        """Assemble the model, one argument for each of its stages. The region stage, if any, runs before both heads.

        Without a mask head, `loss_mask` is 0 and the masks of detections have no cells.

        If `mask_pooler` is the same object as `box_pooler`, training pools the regions once for both heads.
        """
        super().__init__()
        self.pixels = pixels
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.sampler = sampler
        self.box_pooler = box_pooler
        self.region_stage = region_stage
        self.box_head = box_head
        self.selector = selector
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.losses = losses
        # Padding must not be among the regions from which a batch norm takes its statistics.
        heads = nn.ModuleList(stage for stage in (region_stage, box_head, mask_head) if stage is not None)
        self.drop_padding = any(isinstance(module, nn.BatchNorm2d) for module in heads.modules())

    @property
    def size_divisor(self) -> int:
        """The sides of `ImageBatch.pixels` must be multiples of this."""
        return max(*self.backbone.strides, *self.box_pooler.strides)  # without P6, whose sides are rounded up

    def features(self, images: ImageBatch) -> tuple[Tensor, ...]:
        """Return the feature maps of RPN and heads, each `(B, C, H / stride, W / stride)`."""
        return self.neck(self.backbone(self.pixels(images)))

    def forward(
        self, images: ImageBatch, targets: Targets, observe: Callable[[Diagnostics], None] | None = None
    ) -> Losses:
        """Return the losses of a batch. `observe`, if given, is called with the `Diagnostics` of the batch."""
        features = self.features(images)
        proposals, (loss_objectness, loss_rpn_box_reg) = self.rpn(features, images, targets)
        samples = self.sampler(proposals, targets, images.seeds)
        if observe is not None:
            observe(diagnose(proposals, targets, samples))

        image, slot = used_slots(samples.valid, drop_padding=self.drop_padding)
        labels, boxes = samples.labels[image, slot], samples.boxes[image, slot]
        objects = targets.boxes[image, samples.matched[image, slot]]
        regions = self._regions(self.box_pooler, features, boxes, image)
        loss_classifier, loss_box_reg = box_head_losses(
            self.box_head(regions),
            labels,
            encode_deltas(objects, boxes, weights=self.losses.bbox_reg_weights),
            images=image,
            batch=len(images),
            beta=self.losses.smooth_l1_beta,
            per=self.losses.normalizer,
        )

        loss_mask = loss_classifier.new_zeros(())
        if self.mask_head is not None:
            numbers = image * samples.labels.shape[1] + slot  # of the slots in the batch, ascending
            to_train = self._with_mask(samples, targets)
            image, slot = used_slots(to_train, drop_padding=self.drop_padding)
            if self.mask_pooler is self.box_pooler:
                regions = regions[torch.searchsorted(numbers, image * samples.labels.shape[1] + slot)]
            else:
                regions = self._regions(self.mask_pooler, features, samples.boxes[image, slot], image)
            labels = samples.labels[image, slot]
            loss_mask = mask_loss(
                self.mask_head(regions, labels.clamp(min=1)),
                self._mask_targets(samples, targets, images, side=self.mask_head.mask_size)[image, slot],
                positive=to_train[image, slot],
                images=image,
                batch=len(images),
                per=self.losses.normalizer,
            )
        losses = Losses(loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg, loss_mask)
        return losses.weighted(self.losses.weights)

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> Detections:
        """Return the detections of a batch of images, with masks, in pixels of the resized images."""
        features = self.features(images)
        detections = self.detect_boxes(features, images.sizes)
        return replace(detections, masks=self.masks_of(features, detections.boxes, detections.labels))

    @torch.no_grad()
    def detect_boxes(self, features: Sequence[Tensor], sizes: Tensor) -> Detections:
        """Return the detections of a batch without masks, `(B, D, 0, 0)`: the first step of `detect`.

        Args:
            features: of `features`.
            sizes: `(B, 2)` height and width of each image.
        """
        proposals = self.rpn.propose(features, sizes, self.rpn.inference_counts)
        image, slot = used_slots(proposals.valid)
        regions = self._regions(self.box_pooler, features, proposals.boxes[image, slot], image)
        class_logits, box_deltas = (spread(values.float(), proposals.valid) for values in self.box_head(regions))
        return self.selector(proposals, class_logits, box_deltas, sizes)

    @torch.no_grad()
    def masks_of(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the mask probabilities of boxes `(B, D, 4)`: `(B, D, M, M)`; M is 0 without a mask head.

        Args:
            features: of `features`.
            boxes: in pixels of the resized images.
            labels: `(B, D)`, 1..K; the masks of slots with other labels are 0.
        """
        if self.mask_head is None:
            return boxes.new_zeros(*labels.shape, 0, 0)
        image, slot = used_slots(labels > 0)
        regions = self._regions(self.mask_pooler, features, boxes[image, slot], image)
        masks = self.mask_head.probabilities(regions, labels[image, slot].clamp(min=1))
        return spread(masks, labels > 0)

    def _regions(self, pooler: RoIPooler, features: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
        """Return the regions of boxes `(N, 4)`, the input of the heads: `(N, C, S, S)`."""
        regions = pooler(features[: len(pooler.strides)], boxes, images)
        return regions if self.region_stage is None else self.region_stage(regions)

    def _with_mask(self, samples: RoISamples, targets: Targets) -> Tensor:
        """Return which of the first `max_positives` samples are of objects with a mask: `(B, max_positives)` bool."""
        first = slice(self.sampler.max_positives)
        return (samples.labels[:, first] > 0) & targets.has_mask.gather(1, samples.matched[:, first])

    def _mask_targets(self, samples: RoISamples, targets: Targets, images: ImageBatch, *, side: int) -> Tensor:
        """Return the mask targets of the first `max_positives` samples of each image: `(B, max_positives, M, M)`."""
        boxes = samples.boxes[:, : self.sampler.max_positives]
        matched = samples.matched[:, : self.sampler.max_positives]
        if self.losses.mask_target == "torchvision":
            height, width = images.pixels.shape[-2:]
            return mask_targets_torchvision(targets.masks, boxes, matched, side, height, width)
        return mask_targets(targets.masks, boxes, matched, side)

    def compile_dense(self, **options: Any) -> None:
        """Compile backbone, neck, RPN head, region stage and heads in place; parameter names do not change.

        Proposals, sampling and RoI layers are not compiled. `options` are passed to `torch.compile`. Backbone and neck
        are compiled for a fixed image size first, and at the first other size again, for any size. The other modules
        are compiled for dynamic shapes from the start, because the number of regions always differs. torch compiles
        batch sizes of 1 and region counts of 0 and 1 separately.
        """
        self.backbone.compile(**options)
        self.neck.compile(**options)
        heads = (self.rpn.head, self.region_stage, self.box_head, self.mask_head)
        for head in (head for head in heads if head is not None):
            head.compile(**{"dynamic": True, **options})

    def stages(self) -> list[nn.Module]:
        """Return the backbone's stages, first to last, for `engine.optimizer.parameter_groups`.

        The region stage is included, because it has pretrained weights, too.
        """
        return [*self.backbone.stages(), *([] if self.region_stage is None else [self.region_stage])]

    def class_rows(self) -> Mapping[str, ClassRows]:
        """Return the parameters whose rows belong to classes, for `engine.checkpoint.load_weights`."""
        scores, deltas = ClassRows(per_class=1, background=True), ClassRows(per_class=4, background=False)
        rows = {"box_head.cls_score.weight": scores, "box_head.cls_score.bias": scores}
        rows |= {"box_head.bbox_pred.weight": deltas, "box_head.bbox_pred.bias": deltas}
        masks = {} if self.mask_head is None else self.mask_head.class_rows()
        return rows | {f"mask_head.{name}": layout for name, layout in masks.items()}
