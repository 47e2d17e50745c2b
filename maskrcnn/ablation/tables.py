"""The tables of a report as text, for Markdown and HTML: metrics in percent, differences in percentage points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from maskrcnn.ablation.comparison import Difference, share, signed_points
from maskrcnn.ablation.measurement import PARTS
from maskrcnn.ablation.results import AblationResults, VariantResult
from maskrcnn.evaluation.matches import FIGURES
from maskrcnn.evaluation.metric import COCO_METRICS

NOTHING = "\N{EN DASH}"
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Cell:
    """The text of one cell; `strong` sets it in bold."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Row:
    """One row, the name first; the row of the baseline is marked."""

    cells: tuple[Cell, ...]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table; the first column is text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown, with its title as a heading."""
        lines = [
            f"## {self.title}",
            "",
            _line(self.columns),
            _line(["---", *["---:"] * (len(self.columns) - 1)]),
            *(_line([_bold(cell) for cell in row.cells]) for row in self.rows),
        ]
        return "\n".join([*lines, "", self.note] if self.note else lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bold(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.strong else cell.text


def report_tables(results: AblationResults) -> list[Table]:
    """Return the tables of a report in order; tables without data are left out."""
    measured = [part for part in PARTS if any(f"{part}/AP" in variant.mean for variant in results.variants)]
    compared = [part for part in PARTS if any(f"{part}/AP" in variant.differences for variant in results.compared)]
    tables = [figure_table(results, part) for part in measured]
    if compared:
        tables += [*(difference_table(results, part) for part in compared), seed_table(results)]
    if any(variant.paper for variant in results.variants):
        tables.append(paper_table(results))
    if others := other_table(results):
        tables.append(others)
    return [*tables, cost_table(results)]


def figure_table(results: AblationResults, part: str) -> Table:
    """Return the mask or box metrics of each variant: mean and standard deviation over the seeds, in percent."""
    keys = [f"{part}/{figure}" for figure in FIGURES]
    columns = [[variant.mean.get(key, math.nan) for variant in results.variants] for key in keys]
    best = [max((value for value in column if not math.isnan(value)), default=math.nan) for column in columns]
    rows = [
        _row(
            results,
            variant,
            [Cell(str(len(variant.runs)))]
            + [
                Cell(_mean_std(variant, key, _percent), variant.mean.get(key) == maximum)
                for key, maximum in zip(keys, best, strict=True)
            ],
        )
        for variant in results.variants
    ]
    note = "In percent: mean ± standard deviation over the seeds. The best is bold."
    return Table(f"{part.capitalize()} metrics", ("variant", "seeds", *FIGURES), tuple(rows), note)


def _mean_std(variant: VariantResult, key: str, text: Callable[[float], str]) -> str:
    """Return mean and deviation, each formatted by `text`; a dash for a metric that the variant does not have."""
    mean, deviation = (numbers.get(key, math.nan) for numbers in (variant.mean, variant.std))
    return text(mean) + ("" if math.isnan(mean) or math.isnan(deviation) else f" ± {text(deviation)}")


def other_table(results: AblationResults) -> Table | None:
    """Return the metrics that are not COCO's, in their own units; None if there are none."""
    names = dict.fromkeys(name for variant in results.variants for name in variant.mean)
    others = [name for name in names if name not in COCO_METRICS]
    if not others:
        return None
    rows = [
        _row(results, variant, [Cell(_mean_std(variant, name, _three_digits)) for name in others])
        for variant in results.variants
    ]
    note = "Mean ± standard deviation over the seeds, in the unit of each metric. These metrics have no intervals."
    return Table("Other metrics", ("variant", *others), tuple(rows), note)


def difference_table(results: AblationResults, part: str) -> Table:
    """Return the differences of each variant to the baseline with their intervals, in percentage points."""
    rows = [
        _row(results, variant, [_difference(variant.differences.get(f"{part}/{figure}")) for figure in FIGURES])
        for variant in results.compared
    ]
    note = (
        f"In percentage points, with the {share(results.confidence)} interval of a paired bootstrap over the images. "
        "Bold: the interval excludes zero."
    )
    title = f"{part.capitalize()} metrics minus those of {results.baseline}"
    return Table(title, ("variant", *FIGURES), tuple(rows), note)


def _difference(difference: Difference | None) -> Cell:
    if difference is None or math.isnan(difference.interval.value):
        return Cell(NOTHING)
    interval = difference.interval
    value, low, high = (signed_points(number) for number in (interval.value, interval.low, interval.high))
    return Cell(f"{value} [{low}, {high}]", interval.verdict != "not told apart")


def seed_table(results: AblationResults) -> Table:
    """Return the differences of the primary metric for each seed."""
    seeds = sorted({seed for variant in results.compared for seed in variant.differences[results.metric].by_seed})
    rows = []
    for variant in results.compared:
        by_seed = variant.differences[results.metric].by_seed
        cells = [Cell(signed_points(by_seed[seed]) if seed in by_seed else NOTHING) for seed in seeds]
        rows.append(_row(results, variant, cells))
    title = f"{results.metric_name} minus that of {results.baseline}, seed by seed"
    note = (
        "In percentage points. The intervals above cover the sampling of the images, not the variation between seeds, "
        f"which this table shows. If the true difference is zero, about {share(1 - results.confidence)} of the "
        "intervals still exclude zero."
    )
    return Table(title, ("variant", *(f"seed {seed}" for seed in seeds)), tuple(rows), note)


def paper_table(results: AblationResults) -> Table:
    """Return the metrics of the paper beside the measured ones, and both differences to the baseline."""
    paper_by_name = {variant.name: variant.paper for variant in results.variants}
    rows = []
    for variant in results.variants:
        for key, paper_value in variant.paper.items():
            measured_change = variant.differences[key].interval.value if key in variant.differences else math.nan
            paper_change = paper_value - paper_by_name.get(results.baseline, {}).get(key, math.nan)
            marked = variant.name == results.baseline
            changes = [NOTHING, NOTHING] if marked else [_signed(measured_change), _signed(paper_change / 100)]
            cells = [
                variant.name,
                key.replace("/", " "),
                _percent(variant.mean.get(key, math.nan)),
                f"{paper_value:.1f}",
                *changes,
            ]
            rows.append(Row(tuple(map(Cell, cells)), marked))
    columns = ("variant", "metric", "measured", "paper", "measured minus baseline", "paper minus baseline")
    return Table("Comparison with the paper", columns, tuple(rows), "In percent. The values of the paper are on COCO.")


def cost_table(results: AblationResults) -> Table:
    """Return the speed of training and inference, and the peak memory of training."""
    numbers: list[tuple[str, Callable[[VariantResult], str]]] = [
        ("training, images/s", lambda variant: _three_digits(variant.cost.training)),
        ("inference, images/s", lambda variant: _three_digits(variant.cost.inference)),
        ("peak memory, MiB", lambda variant: _whole(variant.cost.memory / MEBIBYTE)),
    ]
    rows = [_row(results, variant, [Cell(text(variant)) for _, text in numbers]) for variant in results.variants]
    note = (
        "Training speed: median over the recorded steps. Inference speed: last evaluation. Both are means over the "
        "seeds; the memory is the maximum over the seeds."
    )
    return Table("Cost", ("variant", *(name for name, _ in numbers)), tuple(rows), note)


def _row(results: AblationResults, variant: VariantResult, cells: Sequence[Cell]) -> Row:
    marked = variant.name == results.baseline
    return Row((Cell(variant.name + (" (baseline)" if marked else "")), *cells), marked)


def _percent(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return NOTHING if math.isnan(value) else signed_points(value)


def _three_digits(value: float) -> str:
    return _whole(value) if value >= 100 else NOTHING if math.isnan(value) else f"{value:.3g}"


def _whole(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.0f}"
