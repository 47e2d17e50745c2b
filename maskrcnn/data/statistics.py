"""Summary statistics of a dataset, as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

SMALL, LARGE = 32**2, 96**2  # COCO's area limits of small, medium and large objects, in square pixels


def summarize(ground_truth: dict[str, Any]) -> str:
    """Return the number of images, and of objects by size and by class, as text.

    Args:
        ground_truth: a dataset in COCO format.
    """
    annotations = ground_truth["annotations"]
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    images, annotated = len(ground_truth["images"]), len({annotation["image_id"] for annotation in annotations})
    sides = np.sqrt([annotation["area"] for annotation in objects]) if objects else np.zeros(1)
    areas = sides**2
    by_size = (areas < SMALL).sum(), ((areas >= SMALL) & (areas <= LARGE)).sum(), (areas > LARGE).sum()
    lines = [
        f"{images} images, {images - annotated} of them without objects",
        f"{len(objects)} objects and {len(annotations) - len(objects)} crowd regions",
        "small, medium, large: " + ", ".join(map(str, by_size)),
        "square root of the area, 5 / 50 / 95 %: "
        + " / ".join(f"{side:.0f}" for side in np.percentile(sides, (5, 50, 95)))
        + " px",
        *_class_lines(ground_truth["categories"], Counter(annotation["category_id"] for annotation in objects)),
    ]
    return "\n".join(lines)


def _class_lines(categories: list[dict[str, Any]], counts: Counter[int]) -> list[str]:
    width = max((len(category["name"]) for category in categories), default=0)
    return [f"  {category['name']:{width}} {counts[category['id']]:7}" for category in categories]
