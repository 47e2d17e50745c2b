"""Parts of charts as inline SVG: scales, axes and text. Text and axes use the colours of the page.

Positions are pixels of the drawing; y points downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# The Okabe-Ito palette without yellow, which is invisible on white, and two of Paul Tol's colours. Further variants
# repeat the colours with other dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
DASHES = ("none", "6 3", "2 3")

WIDTH = 720
ROW = 20  # height of a row with its text and interval
MARGIN = 46  # space for the tick labels beside and below a chart
AIR = 28  # space at the right, for half of the last tick label


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


def ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Return about `count` round numbers between `low` and `high`, in ascending order."""
    exact_step = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(exact_step))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= exact_step * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(multiple * step, 12) for multiple in range(first, last + 1)]


def covering(values: Sequence[float], start: float, stop: float, padding: float = 0.05) -> Scale:
    """Return a scale that covers all values; `padding` at both ends is a fraction of their range."""
    low, high = min(values), max(values)
    margin = padding * (high - low) if high > low else 0.01
    return Scale(low - margin, high + margin, start, stop)


def x_axis(x: Scale, y: float, label: str, *, signed: bool = False) -> Iterable[str]:
    """Return the x axis with grid lines; `signed` values are fractions, labelled in percentage points with a sign."""
    for value in ticks(x.low, x.high):
        yield f'<path d="M{x(value):.1f} 0V{y}" class="{"zero" if signed and value == 0 else "grid"}"/>'
        number = typeset(f"{100 * value:+g}") if signed and value else f"{value:g}"
        yield text_at(x(value), y + 16, number, "middle")
    yield text_at((x.start + x.stop) / 2, y + 34, label, "middle")


def y_axis(y: Scale, left: float) -> Iterable[str]:
    """Return the y axis with grid lines, which start at `left`."""
    for value in ticks(y.low, y.high):
        yield f'<path d="M{left} {y(value):.1f}H{WIDTH - AIR}" class="grid"/>'
        yield text_at(left - 6, y(value) + 4, f"{value:g}", "end")


def text_at(x: float, y: float, text: str, kind: str = "start") -> str:
    """Return a text element; `kind` is a class of the page's style: start, middle, end or heading."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def document(height: float, elements: Iterable[str], label: str) -> str:
    """Return the SVG of a chart, `WIDTH` wide; `label` describes it to those who cannot see it."""
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *(element for element in elements if element), "</svg>"])


def typeset(number: str) -> str:
    """Replace the hyphen of a negative number with the minus sign, which is as wide as a plus."""
    return number.replace("-", "\N{MINUS SIGN}")
