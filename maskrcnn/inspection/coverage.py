"""What the settings of the model make of the objects: how many it cannot find, and the settings that would mend it.

All boxes are `(x1, y1, x2, y2)` at the resolution of the validation transforms. Shapes: G objects, A anchors per cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from maskrcnn.ops.anchors import base_anchors

SAMPLE = 20_000  # objects, evenly spaced, on which settings are tried
TOLERATED = 0.01  # share of objects; below it, no other setting is suggested
# What is tried, the smallest change first: factors of the sizes of each level, which has as many sizes for each factor,
# and aspect ratios that are added.
FACTORS = ((1.0,), (0.5,), (2.0,), (0.25,), (4.0,), (0.125,), (0.5, 1.0), (1.0, 2.0), (0.25, 0.5, 1.0))
FURTHER_RATIOS = ((), (0.25, 4.0))
MENDED = 0.3  # part of a share that another setting may leave
ENLARGEMENTS = (1.25, 1.5, 2.0, 3.0, 4.0)  # of the images that are tried


@dataclass(frozen=True)
class Settings:
    """The settings of the model that limit what it can find."""

    anchor_sizes: tuple[tuple[float, ...], ...]  # px, for each level
    anchor_ratios: tuple[float, ...]  # height / width
    anchor_strides: tuple[int, ...]  # px, for each level
    background: float  # IoU below which an anchor counts as background
    cell: int  # px, stride of the finest map from which regions are pooled
    detections_per_image: int
    short_side: int | None  # px, of the validation transforms; None if they do not resize


class Limit(NamedTuple):
    """A share of the objects that the settings lose, and what would mend it."""

    name: str
    share: float  # 0..1
    remedy: str  # empty if the share is tolerable
    at_inference: bool = False  # whether the setting is one of inference alone


def limits(boxes: np.ndarray, counts: Sequence[int], settings: Settings) -> list[Limit]:
    """Return the shares of the objects that no anchor reaches, that are smaller than a cell, and that are cut off.

    Args:
        boxes: (G, 4).
        counts: objects of each image.
        settings: of the model.
    """
    if not len(boxes):
        return []
    unreached, smaller = unreached_share(boxes, settings), _smaller_share(boxes, settings.cell)
    cut_off = float(np.maximum(np.array(counts) - settings.detections_per_image, 0).sum() / sum(counts))
    return [
        Limit(
            f"no anchor reaches (best IoU below {settings.background:g})",
            unreached,
            _better_anchors(boxes, settings, unreached) if unreached > TOLERATED else "",
        ),
        Limit(
            f"smaller than a cell of {settings.cell} px",
            smaller,
            _larger_images(boxes, settings) if smaller > TOLERATED else "",
        ),
        Limit(
            f"cut off by {settings.detections_per_image} detections per image",
            cut_off,
            f"model.detection.detections_per_image: {-(-max(counts) // 50) * 50} instead cuts off none"
            if cut_off
            else "",
            at_inference=True,
        ),
    ]


def unreached_share(boxes: np.ndarray, settings: Settings) -> float:
    """Return the share of the boxes (G, 4) whose IoU with every anchor is below that of background, 0..1."""
    return float((best_iou(boxes, settings) < settings.background).mean())


def best_iou(boxes: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the IoU of each box with the best anchor, (G,); of each shape, the anchor nearest to the centre counts."""
    best = np.zeros(len(boxes))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for sizes, stride in zip(settings.anchor_sizes, settings.anchor_strides, strict=True):
        grid = np.maximum(np.rint(centres / stride) * stride, 0)
        for anchor in base_anchors(sizes, settings.anchor_ratios).double().numpy():
            low, high = grid + anchor[:2], grid + anchor[2:]
            sides = np.minimum(boxes[:, 2:], high) - np.maximum(boxes[:, :2], low)
            shared = sides.clip(0).prod(axis=1)
            union = areas + (anchor[2:] - anchor[:2]).prod() - shared
            best = np.maximum(best, shared / np.maximum(union, 1e-9))
    return best


def _smaller_share(boxes: np.ndarray, cell: float) -> float:
    return float(((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) < cell**2).mean())


def _sampled(boxes: np.ndarray) -> np.ndarray:
    return boxes[:: -(-len(boxes) // SAMPLE)]


def _better_anchors(boxes: np.ndarray, settings: Settings, share: float) -> str:
    """Return the smallest change of sizes and ratios that mends most of the share, or that which mends most of it."""
    enough = max(TOLERATED, MENDED * share)
    tried: list[tuple[float, Settings]] = []
    for ratios, factors in itertools.product(FURTHER_RATIOS, FACTORS):
        changed = replace(
            settings,
            anchor_sizes=tuple(
                tuple(sorted({size * factor for size in sizes for factor in factors}))
                for sizes in settings.anchor_sizes
            ),
            anchor_ratios=tuple(sorted({*settings.anchor_ratios, *ratios})),
        )
        tried.append((unreached_share(_sampled(boxes), changed), changed))
        if tried[-1][0] <= enough:
            break
    best, changed = min(tried, key=lambda pair: pair[0])
    if best > 0.8 * share:
        return "no other anchors of usual shapes reach many more"
    keys = []
    if changed.anchor_sizes != settings.anchor_sizes:
        keys.append(f"model.rpn.anchor_sizes: [{', '.join(map(_listed, changed.anchor_sizes))}]")
    if changed.anchor_ratios != settings.anchor_ratios:
        keys.append(f"model.rpn.anchor_ratios: {_listed(changed.anchor_ratios)}")
    return f"{' and '.join(keys)} leaves {best:.1%}"


def _larger_images(boxes: np.ndarray, settings: Settings) -> str:
    """Return the smallest enlargement after which few objects are smaller than a cell."""
    shares = [_smaller_share(boxes, settings.cell / factor) for factor in ENLARGEMENTS]
    index = next((index for index, share in enumerate(shares) if share <= TOLERATED), len(shares) - 1)
    factor, share = ENLARGEMENTS[index], shares[index]
    sides = "images"
    if settings.short_side is not None:
        sides = f"short_side: [{round(settings.short_side * factor)}] of resize, with long_side to match"
    more = "" if share <= TOLERATED else ", or the images cut into tiles"
    return f"{sides} ({factor:g} times as large){more} leaves {share:.1%}"


def _listed(numbers: Sequence[float]) -> str:
    return f"[{', '.join(f'{number:.4g}' for number in numbers)}]"
