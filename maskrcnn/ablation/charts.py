"""Charts of a report: confidence intervals and curves; see `visualization.svg`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from maskrcnn.ablation.comparison import signed_points
from maskrcnn.ablation.curves import Curve, mean_curve
from maskrcnn.ablation.results import AblationResults
from maskrcnn.evaluation.bootstrap import Interval
from maskrcnn.visualization.svg import (
    AIR,
    COLOURS,
    DASHES,
    MARGIN,
    ROW,
    WIDTH,
    Scale,
    covering,
    document,
    text_at,
    x_axis,
    y_axis,
)

CURVE_HEIGHT = 260
FEW = 30  # a curve with at most this many points gets a marker at each


def variant_style(results: AblationResults, name: str) -> str:
    """Return the SVG stroke attributes of a variant, which are the same in all charts."""
    index = [variant.name for variant in results.variants].index(name)
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-dasharray="{dash}"'


# ---- Intervals


def forest_plot(results: AblationResults, figures: Sequence[str]) -> str:
    """Draw each variant's difference to the baseline with its interval, grouped by metric; a dot marks each seed.

    Args:
        results: of the ablation.
        figures: names of the metrics, such as `mask/AP`.
    """
    rows = [
        (figure, variant.name, variant.differences[figure])
        for figure in figures
        for variant in results.compared
        if figure in variant.differences and not math.isnan(variant.differences[figure].interval.value)
    ]
    values = [0.0]
    for _, _, difference in rows:
        values += [difference.interval.low, difference.interval.high, *difference.by_seed.values()]
    left = 24 + 7 * max((len(name) for _, name, _ in rows), default=0)
    x = covering(values, left, WIDTH - 160)
    elements, y = [], 0
    for figure in figures:
        elements.append(text_at(0, y + 14, figure.replace("/", " "), "heading"))
        y += ROW
        for _, name, difference in (row for row in rows if row[0] == figure):
            elements.append(text_at(12, y + 14, name))
            elements += _interval(x, y + 10, difference.interval, variant_style(results, name))
            elements += [
                f'<circle cx="{x(value):.1f}" cy="{y + 17}" r="1.8" class="seed"/>'
                for value in difference.by_seed.values()
            ]
            y += ROW
        y += ROW // 3
    label = f"points, minus {results.baseline}"
    return document(y + MARGIN, [*x_axis(x, y, label, signed=True), *elements], f"differences to {results.baseline}")


def _interval(x: Scale, y: float, interval: Interval, style: str) -> Iterable[str]:
    low, value, high = x(interval.low), x(interval.value), x(interval.high)
    yield f'<path d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8" {style} class="interval"/>'
    yield f'<rect x="{value - 3.5:.1f}" y="{y - 3.5}" width="7" height="7" {style} class="value"/>'
    numbers = [signed_points(number) for number in (interval.value, interval.low, interval.high)]
    yield text_at(WIDTH - 150, y + 4, "{} [{}, {}]".format(*numbers))


# ---- Curves


def loss_chart(results: AblationResults) -> str:
    """Draw the training loss against the iteration."""
    return _line_chart(results, {v.name: [run.loss for run in v.runs] for v in results.variants}, "training loss", 1)


def metric_chart(results: AblationResults) -> str:
    """Draw the primary metric against the iteration, in percent."""
    curves = {variant.name: [run.metric for run in variant.runs] for variant in results.variants}
    return _line_chart(results, curves, f"{results.metric_name}, percent", 100)


def _line_chart(results: AblationResults, curves: dict[str, list[Curve]], label: str, unit: float) -> str:
    """Draw a strong line per variant, the mean over its seeds, and a faint line per seed; `unit` scales the values."""
    seed_curves = {name: [curve.thinned() for curve in seeds if len(curve)] for name, seeds in curves.items()}
    seed_curves = {name: seeds for name, seeds in seed_curves.items() if seeds}
    points = [
        (iteration, unit * value)
        for seeds in seed_curves.values()
        for curve in seeds
        for iteration, value in _points(curve)
    ]
    if not points:
        return ""
    x = covering([0.0, *(iteration for iteration, _ in points)], MARGIN, WIDTH - AIR, padding=0)
    y = covering([value for _, value in points], CURVE_HEIGHT, 8)
    elements = []
    for name, seeds in seed_curves.items():
        style = variant_style(results, name)
        if len(seeds) > 1:
            elements += [_path(curve, x, y, unit, f'{style} class="faint"') for curve in seeds]
        mean = mean_curve([curve for curve in curves[name] if len(curve)]).thinned()
        elements.append(_path(mean, x, y, unit, f'{style} class="line"'))
        if len(mean) <= FEW:
            elements += [
                f'<circle cx="{x(iteration):.1f}" cy="{y(unit * value):.1f}" r="2.5" {style} class="value"/>'
                for iteration, value in _points(mean)
            ]
    axes = [*x_axis(x, CURVE_HEIGHT, "iteration"), *y_axis(y, x.start)]
    return document(CURVE_HEIGHT + MARGIN, [*axes, *elements], label)


def _points(curve: Curve) -> Iterable[tuple[float, float]]:
    return zip(curve.iterations, curve.values, strict=True)


def _path(curve: Curve, x: Scale, y: Scale, unit: float, attributes: str) -> str:
    vertices = "L".join(f"{x(iteration):.1f} {y(unit * value):.1f}" for iteration, value in _points(curve))
    return f'<path d="M{vertices}" {attributes}/>' if vertices else ""
