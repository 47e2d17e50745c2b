"""Bar charts and histograms as inline SVG; see `visualization.svg`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from maskrcnn.visualization.svg import AIR, COLOURS, MARGIN, ROW, WIDTH, Scale, document, text_at, x_axis, y_axis

HEIGHT = 180  # px of a histogram, without its labels
LABELS = 12  # most edges with a label


def bar_chart(counts: Mapping[str, float], label: str) -> str:
    """Draw a horizontal bar for each name, with its number.

    Args:
        counts: at least one number from 0 on, by name.
        label: of the axis.
    """
    names = [_shortened(name) for name in counts]
    left = 12 + 7 * max(map(len, names))
    x = Scale(0.0, max(*counts.values(), 1.0), left, WIDTH - 60)
    elements = []
    for row, (name, count) in enumerate(zip(names, counts.values(), strict=True)):
        y = row * ROW
        elements.append(text_at(left - 6, y + 14, name, "end"))
        elements.append(_bar(left, y + 3, x(count) - left, ROW - 6))
        elements.append(text_at(x(count) + 5, y + 14, f"{count:g}"))
    bottom = ROW * len(counts)
    return document(bottom + MARGIN, [*x_axis(x, bottom, label), *elements], label)


def histogram(values: np.ndarray, edges: Sequence[float], label: str, marks: Sequence[float] = ()) -> str:
    """Draw how many values lie between neighbouring edges, as bars of equal width.

    Args:
        values: values below the first or from the last edge on count in the first or the last bar.
        edges: in ascending order, at least two.
        label: of the x axis.
        marks: values at which a vertical line stands, such as sizes of anchors.
    """
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(bins, minlength=len(edges) - 1)
    x = Scale(0.0, len(edges) - 1.0, MARGIN, WIDTH - AIR)
    y = Scale(0.0, float(max(counts.max(), 1)), HEIGHT, 8)
    elements = [*y_axis(y, x.start)]
    for index, count in enumerate(counts.tolist()):
        elements.append(_bar(x(index) + 1, y(count), x(index + 1) - x(index) - 2, y(0) - y(count)))
    step = -(-len(edges) // LABELS)
    for index in range(0, len(edges), step):
        elements.append(text_at(x(index), HEIGHT + 16, f"{edges[index]:.4g}", "middle"))
    for mark in marks:
        place = x(float(np.interp(mark, edges, range(len(edges)))))
        elements.append(f'<path d="M{place:.1f} 8V{HEIGHT}" stroke="{COLOURS[1]}" stroke-dasharray="4 3"/>')
    elements.append(text_at((x.start + x.stop) / 2, HEIGHT + 34, label, "middle"))
    return document(HEIGHT + MARGIN, elements, label)


def _bar(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{COLOURS[0]}"/>'


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}..."
