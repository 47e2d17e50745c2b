"""Charts of a report as inline SVG: intervals around zero, and curves. Text and axes take the page's colour.

Positions are pixels of the drawing, y downwards.
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

# Okabe and Ito's colours without yellow, which white swallows, and two of Paul Tol's; after them dashes tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
DASHES = ("none", "6 3", "2 3")

WIDTH = 720
ROW = 20  # height of a line of text with its interval
MARGIN = 46  # for the numbers beside and below a chart
AIR = 28  # at the right, for the half of a number that stands below the end
CURVE_HEIGHT = 260
FEW = 30  # a curve of fewer points shows each of them


@dataclass(frozen=True)
class Scale:
    """Takes values from `low`..`high` to pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def variant_style(results: AblationResults, name: str) -> str:
    """The stroke of a variant, the same in all charts."""
    place = [variant.name for variant in results.variants].index(name)
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[place % len(COLOURS)]}" stroke-dasharray="{dash}"'


def ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Return round numbers between `low` and `high`: about `count` of them."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


# ---- Intervals


def forest_plot(results: AblationResults, figures: Sequence[str]) -> str:
    """Draw each variant's difference to the baseline with its interval, figure by figure; a dot for every seed."""
    rows = [
        (figure, variant.name, variant.differences[figure])
        for figure in figures
        for variant in results.compared
        if not math.isnan(variant.differences[figure].interval.value)
    ]
    ends = [0.0]
    for _, _, difference in rows:
        ends += [difference.interval.low, difference.interval.high, *difference.by_seed.values()]
    left = 24 + 7 * max((len(name) for _, name, _ in rows), default=0)
    x = _scale(ends, left, WIDTH - 160)
    parts, y = [], 0
    for figure in figures:
        parts.append(_text(0, y + 14, figure.replace("/", " "), "heading"))
        y += ROW
        for _, name, difference in (row for row in rows if row[0] == figure):
            parts.append(_text(12, y + 14, name))
            parts += _interval(x, y + 10, difference.interval, variant_style(results, name))
            parts += [
                f'<circle cx="{x(value):.1f}" cy="{y + 17}" r="1.8" class="seed"/>'
                for value in difference.by_seed.values()
            ]
            y += ROW
        y += ROW // 3
    label = f"points, minus {results.baseline}"
    return _svg(y + MARGIN, [*_ruler(x, y, label, signed=True), *parts], f"differences to {results.baseline}")


def _interval(x: Scale, y: float, interval: Interval, style: str) -> Iterable[str]:
    low, value, high = x(interval.low), x(interval.value), x(interval.high)
    yield f'<path d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8" {style} class="interval"/>'
    yield f'<rect x="{value - 3.5:.1f}" y="{y - 3.5}" width="7" height="7" {style} class="value"/>'
    numbers = [signed_points(number) for number in (interval.value, interval.low, interval.high)]
    yield _text(WIDTH - 150, y + 4, "{} [{}, {}]".format(*numbers))


# ---- Curves


def loss_chart(results: AblationResults) -> str:
    """Draw the loss over the iterations."""
    return _line_chart(results, {v.name: [run.loss for run in v.runs] for v in results.variants}, "training loss", 1)


def metric_chart(results: AblationResults) -> str:
    """Draw the deciding figure over the iterations, in percent."""
    curves = {variant.name: [run.metric for run in variant.runs] for variant in results.variants}
    return _line_chart(results, curves, f"{results.metric_name}, percent", 100)


def _line_chart(results: AblationResults, curves: dict[str, list[Curve]], label: str, unit: float) -> str:
    """One strong line a variant, the mean over its seeds, and a faint one a seed."""
    drawn = {name: [curve.thinned() for curve in seeds if len(curve)] for name, seeds in curves.items()}
    drawn = {name: seeds for name, seeds in drawn.items() if seeds}
    points = [(at, unit * value) for seeds in drawn.values() for curve in seeds for at, value in _points(curve)]
    if not points:
        return ""
    x = _scale([0.0, *(at for at, _ in points)], MARGIN, WIDTH - AIR, air=0)
    y = _scale([value for _, value in points], CURVE_HEIGHT, 8)
    parts = []
    for name, seeds in drawn.items():
        style = variant_style(results, name)
        if len(seeds) > 1:
            parts += [_path(curve, x, y, unit, f'{style} class="faint"') for curve in seeds]
        mean = mean_curve([curve for curve in curves[name] if len(curve)]).thinned()
        parts.append(_path(mean, x, y, unit, f'{style} class="line"'))
        if len(mean) <= FEW:
            parts += [
                f'<circle cx="{x(at):.1f}" cy="{y(unit * value):.1f}" r="2.5" {style} class="value"/>'
                for at, value in _points(mean)
            ]
    return _svg(CURVE_HEIGHT + MARGIN, [*_ruler(x, CURVE_HEIGHT, "iteration"), *_side(y, x.start), *parts], label)


def _points(curve: Curve) -> Iterable[tuple[float, float]]:
    return zip(curve.iterations, curve.values, strict=True)


def _path(curve: Curve, x: Scale, y: Scale, unit: float, attributes: str) -> str:
    places = "L".join(f"{x(at):.1f} {y(unit * value):.1f}" for at, value in _points(curve))
    return f'<path d="M{places}" {attributes}/>' if places else ""


def legend(results: AblationResults) -> str:
    """Name the lines of the charts, in HTML."""
    keys = [
        f'<span class="key"><svg viewBox="0 0 24 8"><path d="M0 4h24" {variant_style(results, variant.name)} '
        f'class="line"/></svg> {escape(variant.name)}</span>'
        for variant in results.variants
    ]
    return "\n".join(keys)


# ---- Parts of both


def _scale(values: Sequence[float], start: float, stop: float, air: float = 0.05) -> Scale:
    """A scale that holds all values with some air; `air` is a share of their range."""
    low, high = min(values), max(values)
    pad = air * (high - low) if high > low else 0.01
    return Scale(low - pad, high + pad, start, stop)


def _ruler(x: Scale, y: float, label: str, *, signed: bool = False) -> Iterable[str]:
    """The axis below a chart, with faint lines through it; `signed` numbers are shares, shown as points."""
    for value in ticks(x.low, x.high):
        yield f'<path d="M{x(value):.1f} 0V{y}" class="{"zero" if signed and value == 0 else "grid"}"/>'
        number = typeset(f"{100 * value:+g}") if signed and value else f"{value:g}"
        yield _text(x(value), y + 16, number, "middle")
    yield _text((x.start + x.stop) / 2, y + 34, label, "middle")


def _side(y: Scale, right: float) -> Iterable[str]:
    """The axis at the left of a chart."""
    for value in ticks(y.low, y.high):
        yield f'<path d="M{right} {y(value):.1f}H{WIDTH - AIR}" class="grid"/>'
        yield _text(right - 6, y(value) + 4, f"{value:g}", "end")


def _text(x: float, y: float, text: str, kind: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *(part for part in parts if part), "</svg>"])
