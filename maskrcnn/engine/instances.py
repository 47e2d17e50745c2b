"""Detections of one image in original pixels: masks, COCO results and pictures of them.

Shapes: N detections, H x W pixels of the original image, M mask side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskrcnn.data.polygons import join, polygons_of
from maskrcnn.data.rle import counts_from_string, crop_from_counts, rle_of_crop
from maskrcnn.ops.masks import PasteConvention, encode_masks
from maskrcnn.structures import Batch, ClassTable, Detections, MaskCrop
from maskrcnn.visualization.colours import ColourBy
from maskrcnn.visualization.drawing import draw_objects
from maskrcnn.visualization.pairs import Objects

LABELME_VERSION = "5.0.0"  # of the format, which has been the same since

Result = dict[str, Any]  # one detection in COCO's results format


@dataclass(frozen=True)
class Instances:
    """The detections of one image, by descending score. Tensors are on the CPU.

    `instances[index]` selects detections by an integer, a slice, a list of integers or a bool tensor (N,):
    `instances[instances.scores >= 0.5]`.
    """

    boxes: Tensor  # (N, 4) float32 (x1, y1, x2, y2) in pixels of the original image, clipped to it
    scores: Tensor  # (N,) class probability
    labels: Tensor  # (N,) int64, 1..K
    mask_probabilities: Tensor  # (N, M, M) in the cells of the box; M = 0 if the model has no mask head
    height: int  # of the original image
    width: int
    classes: ClassTable
    paste: PasteConvention = "exact"
    image: Tensor | None = None  # (3, H, W) uint8 RGB, the original image; only `draw` uses it
    pixel_masks: tuple[MaskCrop, ...] | None = None  # N masks in pixels of the image, in place of `mask_probabilities`

    @classmethod
    def of_batch(
        cls, detections: Detections, batch: Batch, classes: ClassTable, paste: PasteConvention = "exact"
    ) -> list[Instances]:
        """Return the detections of each image of a batch, mapped from resized to original pixels.

        Args:
            detections: in pixels of the resized images, on any device.
            batch: the batch of the detections.
            classes: names and category ids of the labels.
            paste: the paste convention; see `maskrcnn.ops.masks.paste_probabilities`.
        """
        # `Tensor.cpu` waits for the copy from a GPU; `Detections.to` does not.
        boxes, scores, labels, masks = (
            tensor.cpu() for tensor in (detections.boxes, detections.scores, detections.labels, detections.masks)
        )
        valid = labels > 0
        return [
            cls(
                _clip(batch.maps[b].invert(boxes[b][valid[b]]), height, width),
                scores[b][valid[b]],
                labels[b][valid[b]],
                masks[b][valid[b]],
                height,
                width,
                classes,
                paste,
            )
            for b, (height, width) in enumerate(batch.original_sizes)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Instances:
        """Return the selected detections of the image."""
        selection = [index] if isinstance(index, int) else index
        fields = ("boxes", "scores", "labels", "mask_probabilities")
        selected = dataclasses.replace(self, **{name: getattr(self, name)[selection] for name in fields})
        if self.pixel_masks is None:
            return selected
        kept = torch.arange(len(self))[selection].tolist()
        return dataclasses.replace(selected, pixel_masks=tuple(self.pixel_masks[n] for n in kept))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class name of each detection."""
        return tuple(self.classes.names[label - 1] for label in self.labels.tolist())

    @property
    def has_masks(self) -> bool:
        """Whether there are masks: whether the model has a mask head."""
        return self.pixel_masks is not None or self.mask_probabilities.shape[-1] > 0

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool: the masks, computed at each access; `to_coco` encodes the same masks.

        Raises:
            ValueError: the model has no mask head.
        """
        self._require_masks()
        masks = torch.zeros((len(self), self.height, self.width), dtype=torch.bool)
        for n, crop in enumerate(self.mask_crops):
            height, width = crop.pixels.shape
            masks[n, crop.y : crop.y + height, crop.x : crop.x + width] = torch.from_numpy(crop.pixels).bool()
        return masks

    @property
    def mask_crops(self) -> list[MaskCrop]:
        """The N masks of `masks`, cropped; they take much less memory. Empty if the model has no mask head."""
        if self.pixel_masks is not None:
            return list(self.pixel_masks)
        codes = self._encoded_masks()
        return [crop_from_counts(counts_from_string(code["counts"].encode()), self.height) for code in codes]

    def to_coco(self, image_id: int) -> list[Result]:
        """Return one COCO result for each detection.

        A result is `{"image_id", "category_id", "bbox", "score", "segmentation"}`, with the box as `(x, y, width,
        height)` and the mask as compressed run lengths, both in pixels of the original image. Without a mask head it
        has no segmentation.
        """
        xywh = self.boxes.clone()
        xywh[:, 2:] -= self.boxes[:, :2]
        results: list[Result] = [
            {
                "image_id": image_id,
                "category_id": self.classes.category_ids[label - 1],
                "bbox": box,
                "score": score,
            }
            for label, box, score in zip(self.labels.tolist(), xywh.tolist(), self.scores.tolist(), strict=True)
        ]
        if self.has_masks:
            for result, mask in zip(results, self._encoded_masks(), strict=True):
                result["segmentation"] = mask
        return results

    def to_png(self) -> list[Image.Image]:
        """Return N binary images (mode "1") of the size of the image, white in the mask.

        Raises:
            ValueError: the model has no mask head.
        """
        self._require_masks()
        images = []
        for crop in self.mask_crops:
            image = Image.new("1", (self.width, self.height))
            image.paste(Image.fromarray(crop.pixels.astype(bool)), (crop.x, crop.y))
            images.append(image)
        return images

    def to_labelme(self, image_path: str) -> dict[str, Any]:
        """Return the content of a LabelMe file of the image: a polygon for each part of each mask.

        The parts of an instance have one `group_id`, and `description` holds the score. A hole is cut free through a
        line of no width (`data.polygons`). Without a mask head, the boxes are rectangles.

        Args:
            image_path: of the image, relative to the folder of the file.
        """
        shapes = []
        for n, (name, score, rings) in enumerate(
            zip(self.class_names, self.scores.tolist(), self._outlines(), strict=True)
        ):
            for ring in rings:
                shapes.append(
                    {
                        "label": name,
                        "points": ring.round(2).tolist(),
                        "group_id": n if len(rings) > 1 else None,
                        "description": f"score {score:.3f}",
                        "shape_type": "polygon" if self.has_masks else "rectangle",
                        "flags": {},
                    }
                )
        return {
            "version": LABELME_VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": image_path,
            "imageData": None,
            "imageHeight": self.height,
            "imageWidth": self.width,
        }

    def to_yolo(self) -> list[str]:
        """Return the lines of a YOLO label file of the image, as Ultralytics reads it for training.

        A line is the class, counted from 0, and a polygon `x y x y ...`, or without a mask head the box
        `x y width height` by its centre, in parts of the image's width and height. There is one polygon for an
        instance: holes and several parts are connected through lines of no width. An instance without any pixel has no
        line.
        """
        lines = []
        for label, rings in zip(self.labels.tolist(), self._outlines(), strict=True):
            if not rings:
                continue
            points = join(rings) / np.array([self.width, self.height])
            if not self.has_masks:
                points = np.stack([points.mean(axis=0), points[1] - points[0]])
            lines.append(" ".join([str(label - 1), *(f"{value:.6f}" for value in points.flatten())]))
        return lines

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`: `class_id` counts the classes from 0, `data["class_name"]` has their names.

        Raises:
            ImportError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("Instances.to_supervision needs another package: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            mask=self.masks.numpy() if self.has_masks else None,
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy() - 1,
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def draw(self, *, min_score: float = 0.5, colour_by: ColourBy = "instance") -> Image.Image:
        """Return a picture of the image with the detections whose score is at least `min_score`.

        Small images are enlarged; see `maskrcnn.visualization.drawing.draw_objects`, also for `colour_by`.

        Raises:
            ValueError: `image` is None.
        """
        return Image.fromarray(self.picture(min_score=min_score, colour_by=colour_by))

    def picture(self, *, min_score: float, colour_by: ColourBy = "instance") -> np.ndarray:
        """Return the picture of `draw` as an (H, W, 3) uint8 RGB array."""
        if self.image is None:
            raise ValueError(
                "these instances have no image to draw on; set it with dataclasses.replace(..., image=...)"
            )
        chosen = self[self.scores >= min_score]
        background = self.image.permute(1, 2, 0).contiguous().numpy()
        return draw_objects(
            background,
            chosen.boxes,
            chosen.labels,
            chosen.mask_crops,
            self.classes.names,
            chosen.scores,
            colour_by=colour_by,
        )

    def drawn_objects(self) -> Objects:
        """Return the detections as `maskrcnn.visualization.pairs` compares and draws them."""
        return Objects(
            self.boxes.double().numpy(), self.labels.tolist(), self.mask_crops, [float(s) for s in self.scores]
        )

    def _encoded_masks(self) -> list[dict[str, Any]]:
        """Return the masks as COCO's compressed RLE; nothing if there are none."""
        if self.pixel_masks is not None:
            return [rle_of_crop(crop, self.height, self.width) for crop in self.pixel_masks]
        if not self.has_masks:
            return []
        return encode_masks(self.mask_probabilities, self.boxes, self.height, self.width, convention=self.paste)

    def _outlines(self) -> list[list[np.ndarray]]:
        """Return the rings of each mask (`data.polygons`); without masks the upper left and lower right corner."""
        if self.has_masks:
            return [polygons_of(crop) for crop in self.mask_crops]
        return [[box.reshape(2, 2)] for box in self.boxes.double().numpy()]

    def _require_masks(self) -> None:
        if not self.has_masks:
            raise ValueError("these instances have no masks: the model has no mask head")


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    return boxes.clamp(min=boxes.new_zeros(4), max=boxes.new_tensor([width, height, width, height]))
