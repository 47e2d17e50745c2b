"""Charts of a report as inline SVG: confidence intervals and curves. Text and axes use the colours of the page.

Positions are pixels of the drawing; y points downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from maskrcnn.ablation.comparison import signed_points, typeset
from maskrcnn.ablation.curves import Curve, mean_curve
from maskrcnn.ablation.results import AblationResults
from maskrcnn.evaluation.bootstrap import Interval

# The Okabe-Ito palette without yellow, which is invisible on white, and two of Paul Tol's colours. Further variants
# repeat the colours with other dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
DASHES = ("none", "6 3", "2 3")

WIDTH = 720
ROW = 20  # height of a row with its text and interval
MARGIN = 46  # space for the tick labels beside and below a chart
AIR = 28  # space at the right, for half of the last tick label
CURVE_HEIGHT = 260
FEW = 30  # a curve with at most this many points gets a marker at each


@dataclass(frozen=True)
class Scale:
    """Maps values from `low`..`high` linearly to pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Return the pixel position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def variant_style(results: AblationResults, name: str) -> str:
    """Return the SVG stroke attributes of a variant, which are the same in all charts."""
    index = [variant.name for variant in results.variants].index(name)
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-dasharray="{dash}"'


def ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Return about `count` round numbers between `low` and `high`, in ascending order."""
    exact_step = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(exact_step))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= exact_step * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(multiple * step, 12) for multiple in range(first, last + 1)]


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
    x = _scale(values, left, WIDTH - 160)
    elements, y = [], 0
    for figure in figures:
        elements.append(_text(0, y + 14, figure.replace("/", " "), "heading"))
        y += ROW
        for _, name, difference in (row for row in rows if row[0] == figure):
            elements.append(_text(12, y + 14, name))
            elements += _interval(x, y + 10, difference.interval, variant_style(results, name))
            elements += [
                f'<circle cx="{x(value):.1f}" cy="{y + 17}" r="1.8" class="seed"/>'
                for value in difference.by_seed.values()
            ]
            y += ROW
        y += ROW // 3
    label = f"points, minus {results.baseline}"
    return _svg(y + MARGIN, [*_x_axis(x, y, label, signed=True), *elements], f"differences to {results.baseline}")


def _interval(x: Scale, y: float, interval: Interval, style: str) -> Iterable[str]:
    low, value, high = x(interval.low), x(interval.value), x(interval.high)
    yield f'<path d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8" {style} class="interval"/>'
    yield f'<rect x="{value - 3.5:.1f}" y="{y - 3.5}" width="7" height="7" {style} class="value"/>'
    numbers = [signed_points(number) for number in (interval.value, interval.low, interval.high)]
    yield _text(WIDTH - 150, y + 4, "{} [{}, {}]".format(*numbers))


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
    x = _scale([0.0, *(iteration for iteration, _ in points)], MARGIN, WIDTH - AIR, padding=0)
    y = _scale([value for _, value in points], CURVE_HEIGHT, 8)
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
    axes = [*_x_axis(x, CURVE_HEIGHT, "iteration"), *_y_axis(y, x.start)]
    return _svg(CURVE_HEIGHT + MARGIN, [*axes, *elements], label)


def _points(curve: Curve) -> Iterable[tuple[float, float]]:
    return zip(curve.iterations, curve.values, strict=True)


def _path(curve: Curve, x: Scale, y: Scale, unit: float, attributes: str) -> str:
    vertices = "L".join(f"{x(iteration):.1f} {y(unit * value):.1f}" for iteration, value in _points(curve))
    return f'<path d="M{vertices}" {attributes}/>' if vertices else ""


# ---- Shared by both


def _scale(values: Sequence[float], start: float, stop: float, padding: float = 0.05) -> Scale:
    """Return a scale that covers all values; `padding` at both ends is a fraction of their range."""
    low, high = min(values), max(values)
    margin = padding * (high - low) if high > low else 0.01
    return Scale(low - margin, high + margin, start, stop)


def _x_axis(x: Scale, y: float, label: str, *, signed: bool = False) -> Iterable[str]:
    """Return the x axis with grid lines; `signed` values are fractions, labelled in percentage points with a sign."""
    for value in ticks(x.low, x.high):
        yield f'<path d="M{x(value):.1f} 0V{y}" class="{"zero" if signed and value == 0 else "grid"}"/>'
        number = typeset(f"{100 * value:+g}") if signed and value else f"{value:g}"
        yield _text(x(value), y + 16, number, "middle")
    yield _text((x.start + x.stop) / 2, y + 34, label, "middle")


def _y_axis(y: Scale, left: float) -> Iterable[str]:
    """Return the y axis with grid lines, which start at `left`."""
    for value in ticks(y.low, y.high):
        yield f'<path d="M{left} {y(value):.1f}H{WIDTH - AIR}" class="grid"/>'
        yield _text(left - 6, y(value) + 4, f"{value:g}", "end")


def _text(x: float, y: float, text: str, kind: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _svg(height: float, elements: Iterable[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *(element for element in elements if element), "</svg>"])
