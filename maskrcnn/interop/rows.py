"""Orders of the rows of predictors: classes and background, and the anchors of a cell.

Ours: scores have background first, then the classes. Boxes and masks have no background. Anchors are ordered by size,
then by ratio.

Shapes: K classes, A anchors per cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from maskrcnn.structures import ClassTable

RATIOS = 3  # of the anchors, in every framework
NEVER = -1e4  # logit of a row without a class: its probability is 0 in float32

_SCORES, _DELTAS, _MASKS = "box_head.cls_score.", "box_head.bbox_pred.", "mask_head.logits."
_OBJECTNESS, _ANCHOR_DELTAS = "rpn.head.objectness_logits.", "rpn.head.anchor_deltas."


@cache
def coco_classes() -> ClassTable:
    """Return the 80 classes of COCO with their ids from 1 to 90."""
    categories = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    known = {name: category for category, name in enumerate(categories) if category and name != "N/A"}
    return ClassTable(tuple(known), tuple(known.values()))


@dataclass(frozen=True)
class RowOrder:
    """The order of rows in another framework.

    background: where the scores have it. If first, boxes and masks have rows of background, too.
    coco_ids: whether the rows of COCO's classes are their ids, so that 91 rows are 80 classes.
    anchors_by: the outer order of the anchors of a cell.
    """

    background: Literal["first", "last"]
    coco_ids: bool = False
    anchors_by: Literal["size", "ratio"] = "size"

    def num_scores(self, classes: ClassTable) -> int:
        """Return the number of rows of scores that a file of these classes has."""
        if self.coco_ids and classes.category_ids == coco_classes().category_ids:
            return max(classes.category_ids) + 1
        return len(classes) + 1

    def rows(self, name: str, *, scores: int, anchors: int) -> list[int]:
        """Return for each of our rows of a predictor's tensor its row in the file.

        Args:
            name: our name of the tensor, for which `count` is not None.
            scores: number of rows of scores in the file.
            anchors: A.
        """
        slots = self._slots(scores)
        rows = {_SCORES: [0 if self.background == "first" else scores - 1, *slots]}
        rows |= {_DELTAS: _blocks(slots), _MASKS: slots}
        rows |= {_OBJECTNESS: self._anchors(anchors), _ANCHOR_DELTAS: _blocks(self._anchors(anchors))}
        return next(order for prefix, order in rows.items() if name.startswith(prefix))

    def count(self, name: str, *, scores: int, anchors: int) -> int | None:
        """Return the number of rows of a predictor's tensor (by our name) in the file; None for other tensors."""
        blocks = scores if self.background == "first" else scores - 1
        counts = {_SCORES: scores, _DELTAS: 4 * blocks, _MASKS: blocks}
        counts |= {_OBJECTNESS: anchors, _ANCHOR_DELTAS: 4 * anchors}
        return next((count for prefix, count in counts.items() if name.startswith(prefix)), None)

    def _has_coco_ids(self, scores: int) -> bool:
        return self.coco_ids and scores == max(coco_classes().category_ids) + 1

    def _slots(self, scores: int) -> list[int]:
        """Return the block of each class in the file."""
        if self._has_coco_ids(scores):
            return list(coco_classes().category_ids)
        first = 1 if self.background == "first" else 0
        return list(range(first, first + scores - 1))

    def _anchors(self, anchors: int) -> list[int]:
        if self.anchors_by == "size":
            return list(range(anchors))
        sizes = anchors // RATIOS
        return [ratio * sizes + size for size in range(sizes) for ratio in range(RATIOS)]


def scatter_rows(tensor: Tensor, name: str, rows: Sequence[int], count: int) -> Tensor:
    """Return `count` rows, of which those with the indices `rows` are the rows of `tensor`; others predict nothing."""
    fill = NEVER if name == f"{_SCORES}bias" else 0.0
    scattered = tensor.new_full((count, *tensor.shape[1:]), fill)
    scattered[list(rows)] = tensor
    return scattered


def _blocks(rows: Sequence[int]) -> list[int]:
    return [4 * row + coordinate for row in rows for coordinate in range(4)]
