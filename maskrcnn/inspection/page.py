"""The examination as one self-contained HTML page, with charts, pictures of the faults, and a sample of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskrcnn.data.findings import Finding
from maskrcnn.inspection.examination import Examination, Examined, Group
from maskrcnn.inspection.pictures import Picture, finding_picture, samples
from maskrcnn.visualization.bars import bar_chart, histogram
from maskrcnn.visualization.pages import page_template

TEMPLATE = Path(__file__).with_name("page.html.jinja")  # text in it is escaped, except for the charts
LISTED = 100  # findings of a kind; `findings.jsonl` has all
DRAWN = 6  # pictures of a kind
CLASSES = 100  # bars
SIDES = tuple(float(2**power) for power in np.arange(1, 11.5, 0.5))  # px, edges of a histogram


class SplitPage(NamedTuple):
    """One split on the page."""

    examined: Examined
    charts: Mapping[str, str]  # SVG by title
    faults: Mapping[str, Sequence[Picture]]  # by kind of fault
    sample: Sequence[Picture]


def html_page(examination: Examination, *, title: str, count: int, provenance: str) -> str:
    """Return the whole page.

    Args:
        examination: of the splits.
        title: of the page.
        count: number of images of a sample.
        provenance: command and versions, as plain text.
    """
    pages = []
    for split in examination.splits:
        dataset = examination.datasets.get(split.subject.name)
        sample = samples(split.subject, dataset, count) if dataset is not None and count else []
        pictures = {group.fault: _pictures(split, group, examination.splits[0]) for group in split.groups}
        pages.append(SplitPage(split, charts(split, examination.settings.anchor_sizes), pictures, sample))
    return page_template(TEMPLATE).render(
        title=title, examination=examination, pages=pages, listed=LISTED, provenance=provenance
    )


def _pictures(split: Examined, group: Group, train: Examined) -> list[Picture]:
    """Draw the first findings; beside a validation image that is in the training set, the image there."""
    drawn = []
    for finding in group.findings[: 2 * DRAWN]:
        drawn.append(finding_picture(split.subject, finding))
        if finding.twin_id is not None:
            drawn.append(finding_picture(train.subject, Finding(finding.fault, "the training image", finding.twin_id)))
    return [picture for picture in drawn if picture is not None][:DRAWN]


def charts(split: Examined, anchor_sizes: Sequence[Sequence[float]]) -> dict[str, str]:
    """Return the charts of a split, SVG by title; none without objects."""
    boxes, counts = split.boxes, np.array(split.counts)
    if not len(boxes):
        return {}
    sides = boxes[:, 2:] - boxes[:, :2]
    marks = sorted({size for sizes in anchor_sizes for size in sizes})
    masks = np.concatenate([read.areas for read in split.images])
    sizes = np.array([(image["height"], image["width"]) for image in split.subject.images])
    most = int(counts.max())
    return {
        "Size of the objects as the network sees them (dashed: anchors)": histogram(
            np.sqrt(sides.prod(axis=1)), SIDES, "square root of the area of the box, px", marks
        ),
        "Size of the objects in the images": histogram(
            np.sqrt(masks), SIDES, "square root of the area of the mask, px"
        ),
        "Aspect ratio of the objects": histogram(
            sides[:, 1] / sides[:, 0], tuple(2.0 ** np.arange(-4, 4.5, 0.5)), "height / width of the box"
        ),
        "Objects in an image": histogram(counts, _whole_edges(most), "objects"),
        "Size of the images": histogram(
            np.sqrt(sizes.prod(axis=1)), _edges(np.sqrt(sizes.prod(axis=1))), "square root of the area, px"
        ),
        "Objects of each class": bar_chart(_classes(split), "objects"),
    }


def _whole_edges(most: int) -> list[float]:
    step = -(-(most + 1) // 25)
    return [float(edge) for edge in range(0, most + step + 1, step)]


def _edges(values: np.ndarray) -> list[float]:
    low, high = int(values.min()), int(values.max()) + 1
    step = max(1, -(-(high - low) // 20))
    return [float(edge) for edge in range(low, high + step, step)]


def _classes(split: Examined) -> dict[str, float]:
    """Return the number of objects by class, the most frequent first; the last ones together if there are many."""
    names = split.subject.classes.names
    counts = Counter(dict.fromkeys(range(1, len(names) + 1), 0))
    counts.update(label for read in split.images for label in read.labels.tolist())
    ranked = counts.most_common()
    shown = {
        f"{names[label - 1]} ({label})" if _repeated(names, label) else names[label - 1]: float(count)
        for label, count in ranked[:CLASSES]
    }
    if len(ranked) > CLASSES:
        shown[f"{len(ranked) - CLASSES} others"] = float(sum(count for _, count in ranked[CLASSES:]))
    return shown


def _repeated(names: Sequence[str], label: int) -> bool:
    return names.count(names[label - 1]) > 1
