"""Writes what an ablation found: `report.md`, `report.html`, `results.json` and TensorBoard events.

`results.json` holds the numbers. Figures are named as in `evaluation/metrics.json` and lie in 0..1, like their
differences; null stands where there is nothing to measure, or for the deviation of one seed.

    title, baseline     text
    metric              the figure that decides
    confidence          of the intervals, 0 to 1
    resamples           of the bootstrap
    unfinished          names of the runs that are left out
    made_by             command, hardware and versions, as text
    variants            object: by name
        mean, std       object: each figure over the finished seeds; std with n - 1
        paper           object: the paper's own figures, in percent
        cost            object: `training` and `inference` in images per second, `memory` in bytes
        sentence        what the deciding figure says; null for the baseline
        minus_baseline  object: for each figure `value`, `low`, `high`, `verdict` and `by_seed`
        seeds           object: for each finished seed its `figures`, its `cost`, and the curves `loss` and `metric`:
                        lists of [iteration, value], long ones thinned to means; the run's metrics.jsonl has all
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from maskrcnn.ablation.comparison import Difference
from maskrcnn.ablation.curves import Curve, mean_curve
from maskrcnn.ablation.html_report import html_page
from maskrcnn.ablation.measurement import RunResult
from maskrcnn.ablation.pictures import galleries
from maskrcnn.ablation.plan import Plan
from maskrcnn.ablation.results import AblationResults, VariantResult
from maskrcnn.ablation.tables import report_tables
from maskrcnn.training.metrics import TENSORBOARD_FOLDER, without_nan

OF_ONE_RUN = ("command:", "seed:")  # lines of `environment.txt` that the report's own command stands for


def write_report(plan: Plan, results: AblationResults) -> None:
    """Write every form of the report into `plan.out`; an earlier report is replaced."""
    made_by = provenance(results)
    markdown = markdown_report(results, made_by)
    page = html_page(results, galleries(results), notes(results), made_by)
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / "report.md").write_text(markdown, encoding="utf-8")
    (plan.out / "report.html").write_text(page, encoding="utf-8")
    numbers = json.dumps(without_nan({**as_dict(results), "made_by": made_by}), indent=1, allow_nan=False)
    (plan.out / "results.json").write_text(numbers + "\n", encoding="utf-8")
    write_events(plan.out / TENSORBOARD_FOLDER, results, markdown)


def markdown_report(results: AblationResults, made_by: str) -> str:
    """Return the report as Markdown: what was found, the tables, how it was made."""
    parts = [
        f"# {results.title}\n",
        "".join(f"- {sentence}\n" for sentence in results.sentences),
        *(f"{note}\n" for note in notes(results)),
        *(table.markdown() for table in report_tables(results)),
        f"## How it was made\n\n```\n{made_by}\n```\n",
    ]
    return "\n".join(part for part in parts if part)


def notes(results: AblationResults) -> list[str]:
    """Return what a reader must know of the sentences: how they came about, and which runs they leave out."""
    found = []
    if results.compared:
        found.append(
            f"Each interval comes from {results.resamples:,} resamples of the images, the same for both sides, with "
            "AP computed anew and the seeds averaged. It covers the choice of the images, not the luck of the seeds, "
            "which the differences seed by seed show."
        )
    seeds = {variant.name: [result.run.seed for result in variant.runs] for variant in results.variants}
    for variant in results.compared:
        common = list(variant.differences[results.metric].by_seed)
        if not common == seeds[variant.name] == seeds[results.baseline]:
            names, listed = f"{variant.name} is compared with {results.baseline}", ", ".join(map(str, common))
            found.append(f"{names} over the seeds that both have finished: {listed}.")
    if results.unfinished:
        found.append(f"Not finished, and left out: {', '.join(results.unfinished)}.")
    return found


def provenance(results: AblationResults) -> str:
    """Return this command, and on what the runs were trained, as each noted when it last started."""
    places: dict[str, list[str]] = {}
    for result in (result for variant in results.variants for result in variant.runs):
        if result.run.directory.environment.exists():
            blocks = result.run.directory.environment.read_text(encoding="utf-8").strip().split("\n\n")
            lines = [line for line in blocks[-1].splitlines() if not line.startswith(OF_ONE_RUN)]
            places.setdefault("\n".join(lines), []).append(result.run.name)
    command = f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}"
    if len(places) == 1:
        return "\n".join([command, *places])
    return "\n\n".join([command, *(f"{', '.join(names)}:\n{text}" for text, names in places.items())])


def as_dict(results: AblationResults) -> dict[str, Any]:
    """Return the results as the module's docstring tells, with nan in place of null."""
    return {
        "title": results.title,
        "baseline": results.baseline,
        "metric": results.metric,
        "confidence": results.confidence,
        "resamples": results.resamples,
        "unfinished": results.unfinished,
        "variants": {variant.name: _variant(variant) for variant in results.variants},
    }


def _variant(variant: VariantResult) -> dict[str, Any]:
    return {
        "mean": variant.mean,
        "std": variant.std,
        "paper": variant.paper,
        "cost": dataclasses.asdict(variant.cost),
        "sentence": variant.sentence,
        "minus_baseline": {key: _difference(difference) for key, difference in variant.differences.items()},
        "seeds": {str(result.run.seed): _run(result) for result in variant.runs},
    }


def _difference(difference: Difference) -> dict[str, Any]:
    interval = difference.interval
    ends = {"value": interval.value, "low": interval.low, "high": interval.high, "verdict": interval.verdict}
    return {**ends, "by_seed": {str(seed): value for seed, value in difference.by_seed.items()}}


def _run(result: RunResult) -> dict[str, Any]:
    thinned = {name: curve.thinned() for name, curve in _curves(result).items()}
    curves = {name: list(zip(curve.iterations, curve.values, strict=True)) for name, curve in thinned.items()}
    return {"figures": result.figures, "cost": dataclasses.asdict(result.cost), **curves}


def _curves(result: RunResult) -> dict[str, Curve]:
    return {"loss": result.loss, "metric": result.metric}


def write_events(folder: Path, results: AblationResults, markdown: str) -> None:
    """Write TensorBoard events: the report as text, and for each variant its mean curves and figures.

    The figures are also the metrics of the HPARAMS page, where variants can be sorted by them.
    """
    if folder.exists():
        shutil.rmtree(folder)
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("report", markdown)
    for variant in results.variants:
        with SummaryWriter(str(folder / variant.name)) as writer:
            _write_variant(writer, results, variant)


def _write_variant(writer: SummaryWriter, results: AblationResults, variant: VariantResult) -> None:
    figures = {key: value for key, value in variant.mean.items() if not math.isnan(value)}
    writer.add_hparams({"variant": variant.name}, figures, run_name=".")  # it writes the figures as scalars, too
    curves = {"training loss": "loss", f"course of {results.metric_name}": "metric"}
    for title, name in curves.items():
        mean = mean_curve([_curves(result)[name] for result in variant.runs])
        for at, value in zip(mean.iterations, mean.values, strict=True):
            writer.add_scalar(title, value, int(at))
